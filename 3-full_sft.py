"""Full fine-tuning: a pretrained model learns to answer.

Reads   out/pretrain_{dim}[_moe].pth, dataset/sft_data.csv (history,q,a), or JSON and JSONL conversations
Writes  out/full_sft_{dim}[_moe].pth with .json (what it is), .jsonl (log), _resume.pth (to continue)
Run     python 3-full_sft.py                                  one device, or the CPU
        torchrun --nproc_per_node 2 3-full_sft.py             several devices; also --fsdp, --deepspeed
Next    python 2-eval.py to chat with it

全参数微调：让预训练过的模型学会回答问题。
读入    out/pretrain_{dim}[_moe].pth、dataset/sft_data.csv（history,q,a），也可用 JSON、JSONL 对话
写出    out/full_sft_{dim}[_moe].pth，以及 .json（说明）、.jsonl（日志）、_resume.pth（断点）
运行    python 3-full_sft.py（单卡或 CPU）；torchrun --nproc_per_node 2 3-full_sft.py（多卡；可加 --fsdp、--deepspeed）
下一步  python 2-eval.py 与它对话
"""

import argparse

import torch.nn.functional as F

from model.checkpoint import Checkpoint, find_weights, load_model
from model.cli import add_training_flags, resolve_val_path, run_main
from model.dataset import IGNORE, SFTData
from model.LMConfig import SIZES
from model.log import Log
from model.optim import cosine_lr, make_optimizer, set_lr
from model.runtime import Plan, Run
from model.tokenizer import load_tokenizer


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="model size (default: small, 26M)")
    parser.add_argument(
        "--init_from", help="a .pth, or a stage's name in --out_dir, whose weights to start from (default: pretrain)"
    )
    add_training_flags(
        parser,
        learning_rate=2e-4,
        epochs=3,
        batch_size=16,
        data="sft_data.csv",
        wandb_project="MiniMind-Full-SFT",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    # 1. Where we run
    run = Run(args)

    # 2. The model
    tokenizer = load_tokenizer(args.tokenizer_dir)
    init_from = find_weights(args.init_from or "pretrain", args.out_dir, args.size)
    model, _ = load_model(init_from, tokenizer=tokenizer)
    run.print(f"starting from {init_from}")
    model.config.max_seq_len = max(model.config.max_seq_len, args.max_seq_len)
    run.place(model, args)

    # 3. The data: whole conversations, packed into rows; only answers have labels
    def open_data(path):
        return SFTData(path, tokenizer, args.max_seq_len, seed=args.seed, workers=args.num_workers)

    data = run.main_first(lambda: open_data(args.data_path))
    val_path = resolve_val_path(args)
    run.print(f"held-out data: {val_path or 'none'}")
    val_data = run.main_first(lambda: open_data(val_path)) if val_path else None
    plan = Plan(data, args, run, model)

    # 4. Optimizer, resume, wrapping
    optimizer = make_optimizer(model, args.optimizer, args.learning_rate, args.weight_decay)
    checkpoint = Checkpoint(run, "full_sft", model, optimizer, tokenizer, plan, args)
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
                answers = batch.labels != IGNORE  # (B, T): every token of an answer, and the </s> that ends it
                with run.autocast():
                    logits, aux = model(batch.input_ids, documents=batch.documents, select=answers)  # (N, V)
                # cross-entropy of the answers, as this micro-batch's share of ONE mean over the step's targets
                loss = F.cross_entropy(logits.float(), batch.labels[answers], reduction="sum") / num_targets
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
