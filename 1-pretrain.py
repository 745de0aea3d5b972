"""Pretraining: a model learns to continue text.

Reads   dataset/pretrain_data.csv (column text; .jsonl with {"text"} too), model/minimind_tokenizer
Writes  out/pretrain_{dim}[_moe].pth with .json (what it is), .jsonl (log), _resume.pth (to continue)
Run     python 1-pretrain.py                                  one device, or the CPU
        torchrun --nproc_per_node 2 1-pretrain.py             several devices; also --fsdp, --deepspeed
Next    python 0-eval_pretrain.py to see it write, then python 3-full_sft.py

预训练：让模型学会续写文本。
读入    dataset/pretrain_data.csv（一列 text；也可用 {"text"} 的 .jsonl）、model/minimind_tokenizer
写出    out/pretrain_{dim}[_moe].pth，以及 .json（说明）、.jsonl（日志）、_resume.pth（断点）
运行    python 1-pretrain.py（单卡或 CPU）；torchrun --nproc_per_node 2 1-pretrain.py（多卡；可加 --fsdp、--deepspeed）
下一步  python 0-eval_pretrain.py 看续写效果，然后 python 3-full_sft.py
"""

import argparse

import torch.nn.functional as F

from model.checkpoint import Checkpoint, find_weights, load_model
from model.cli import add_training_flags, overrides, resolve_val_path, run_main
from model.dataset import IGNORE, PretrainData
from model.LMConfig import SIZES, LMConfig
from model.log import Log
from model.model import Transformer
from model.optim import cosine_lr, make_optimizer, set_lr
from model.runtime import Plan, Run
from model.tokenizer import load_tokenizer


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="model size (default: small, 26M)")
    parser.add_argument("--override", nargs="+", default=[], metavar="NAME=VALUE", help="LMConfig fields, e.g. dim=384")
    parser.add_argument(
        "--init_from", help="start from these weights, a .pth or its name in --out_dir, and not from random ones"
    )
    parser.add_argument(
        "--cross_documents",
        action="store_true",
        help="attention may look back into the documents before; by default it stays inside each document, which "
        "learned faster in the time (docs/benchmarks.md)",
    )
    add_training_flags(
        parser,
        learning_rate=5e-4,
        epochs=1,
        batch_size=32,
        data="pretrain_data.csv",
        wandb_project="MiniMind-Pretrain",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    # 1. Where we run
    run = Run(args)

    # 2. The model
    tokenizer = load_tokenizer(args.tokenizer_dir)
    chosen = overrides(args.override)
    if args.init_from:
        init_from = find_weights(args.init_from, args.out_dir, args.size)
        model, _ = load_model(init_from, tokenizer=tokenizer, n_heads=chosen.get("n_heads"))
        model.config.require(chosen)
        model.config.max_seq_len = max(model.config.max_seq_len, args.max_seq_len)
        run.print(f"starting from {init_from}")
    else:
        config = LMConfig.from_size(args.size, **chosen)
        config.vocab_size, config.max_seq_len = tokenizer.vocab_size, args.max_seq_len
        config.require(chosen)
        model = Transformer(config)
    run.place(model, args)

    # 3. The data: documents laid end to end, cut into full rows
    def open_data(path):
        return PretrainData(
            path,
            tokenizer,
            args.max_seq_len,
            isolate=not args.cross_documents,
            seed=args.seed,
            workers=args.num_workers,
        )

    data = run.main_first(lambda: open_data(args.data_path))
    val_path = resolve_val_path(args)
    run.print(f"held-out data: {val_path or 'none'}")
    val_data = run.main_first(lambda: open_data(val_path)) if val_path else None
    plan = Plan(data, args, run, model)

    # 4. Optimizer, resume, wrapping
    optimizer = make_optimizer(model, args.optimizer, args.learning_rate, args.weight_decay)
    checkpoint = Checkpoint(run, "pretrain", model, optimizer, tokenizer, plan, args)
    start_step = checkpoint.start(args.resume)
    log = Log(run, checkpoint.log_path, args, model, plan.total_steps, start_step)
    model, optimizer = run.wrap(model, optimizer)

    # 5. The loop: one turn is one optimizer step
    for step in range(start_step, plan.total_steps):
        lr = cosine_lr(step, plan.total_steps, plan.warmup_steps, args.learning_rate)
        set_lr(optimizer, lr)
        batches = plan.batches(step)
        num_targets = run.sum(sum(batch.num_targets for batch in batches))
        num_tokens = run.sum(sum(batch.num_tokens for batch in batches))
        step_loss = step_aux = 0.0
        for i, batch in enumerate(batches):
            with run.sync_grads(model, last=i == len(batches) - 1):
                with run.autocast():
                    logits, aux = model(batch.input_ids, documents=batch.documents)  # (B, T, V)
                # cross-entropy of the next token, as this micro-batch's share of ONE mean over the step's targets
                loss = F.cross_entropy(
                    logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum"
                )
                loss = loss / num_targets
                aux = aux * len(batch.labels) / plan.rows_per_step  # balance of the experts, a mean over rows
                run.backward(loss + aux)
            step_loss += loss.detach()
            step_aux += aux.detach()
        step_loss, step_aux = run.sum(step_loss), run.sum(step_aux)
        grad_norm = run.step(model, optimizer, args.grad_clip)
        run.check_finite(step_loss, grad_norm, f"step {step + 1}, learning rate {lr:.2e}, {plan.position(step)}")
        log.step(step + 1, step_loss, lr, grad_norm, num_tokens, step_aux, run.unwrap(model).expert_load())

        stop = run.should_stop()
        if val_data and plan.due(step, args.val_interval) and not (stop and step + 1 < plan.total_steps):
            log.validation(step + 1, **run.held_out(model, val_data, args.batch_size))
        if stop or plan.due(step, args.save_interval):
            checkpoint.save(step + 1, log.figures())
        if stop:
            break

    # 6. The end
    log.close()
    run.print(f"weights: {checkpoint.path}")
    run.close()
    return run.exit_code


if __name__ == "__main__":
    run_main(main)
