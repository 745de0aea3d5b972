"""LoRA fine-tuning: a small adapter teaches a chat model something new; the model's own weights stay as they are.

Reads   out/full_sft_{dim}[_moe].pth, dataset/lora_data.csv (every format that 3-full_sft.py reads)
Writes  out/lora_{name}_{dim}[_moe].pth, the adapter alone, with .json, .jsonl (log), _resume.pth (to continue)
Run     python 4-lora_sft.py                                  one device, or the CPU
        torchrun --nproc_per_node 2 4-lora_sft.py             several devices; also --fsdp, --deepspeed
Next    python 2-eval.py --lora identity; scripts/merge_lora.py makes one .pth of model and adapter

LoRA 微调：用一个很小的适配器教会对话模型新东西，模型自身的权重不变。
读入    out/full_sft_{dim}[_moe].pth、dataset/lora_data.csv（3-full_sft.py 能读的格式都可以）
写出    out/lora_{name}_{dim}[_moe].pth（只有适配器），以及 .json、.jsonl（日志）、_resume.pth（断点）
运行    python 4-lora_sft.py；torchrun --nproc_per_node 2 4-lora_sft.py（多卡；可加 --fsdp、--deepspeed）
下一步  python 2-eval.py --lora identity；scripts/merge_lora.py 把模型和适配器合并成一个 .pth
"""

import argparse

import torch.nn.functional as F

from model.checkpoint import Checkpoint, find_weights, load_model
from model.cli import (
    adapter_name,
    add_adapter_flags,
    add_general_flag,
    add_training_flags,
    if_there,
    number,
    resolve_val_path,
    run_main,
)
from model.dataset import IGNORE, MixedData, SFTData
from model.LMConfig import SIZES
from model.log import Log
from model.lora import LoRAConfig, add_adapter, trainable_table
from model.optim import cosine_lr, make_optimizer, set_lr
from model.runtime import Plan, Run
from model.tokenizer import load_tokenizer


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="model size (default: small, 26M)")
    parser.add_argument(
        "--init_from", help="a .pth, or a stage's name in --out_dir: the weights to add to (default: full_sft)"
    )
    parser.add_argument(
        "--lora_name", type=adapter_name, default="identity", help="name of the adapter (default: identity)"
    )
    parser.add_argument(
        "--replay_path",
        help="instructions of the stage before, mixed in against forgetting; '' for none (default: "
        "dataset/sft_data.csv, if it is there)",
    )
    parser.add_argument(
        "--replay_share", type=number(float, 0, 0.99), default=0.5, help="their share of the rows (default: 0.5)"
    )
    add_adapter_flags(parser)
    add_general_flag(parser)
    add_training_flags(
        parser,
        learning_rate=3e-3,
        epochs=20,
        batch_size=2,
        data="lora_data.csv",
        wandb_project="MiniMind-LoRA",
        weight_decay=0.0,
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    # 1. Where we run
    run = Run(args)

    # 2. The model, frozen, and the adapter in it
    tokenizer = load_tokenizer(args.tokenizer_dir)
    init_from = find_weights(args.init_from or "full_sft", args.out_dir, args.size)
    model, _ = load_model(init_from, tokenizer=tokenizer)
    run.print(f"starting from {init_from}")
    lora = LoRAConfig(args.rank, args.alpha, args.dropout, args.target, args.modules_to_save)
    add_adapter(model, lora)
    run.print(trainable_table(model))
    run.place(model, args)

    # 3. The data: conversations as in 3-full_sft.py, and some of that stage among them
    def open_data(path):
        return SFTData(path, tokenizer, args.max_seq_len, seed=args.seed, workers=args.num_workers)

    def open_if(path):
        return run.main_first(lambda: open_data(path)) if path else None

    data, val_path = run.main_first(lambda: open_data(args.data_path)), resolve_val_path(args)
    replay_path = if_there(args.replay_path, "sft_data.csv")
    general_path = if_there(args.general_path, "general_val.csv")
    run.print(f"held-out data: {val_path or 'none'}; general instructions: {general_path or 'none'}")
    val_data, general_data = open_if(val_path), open_if(general_path)
    if replay_path and args.replay_share:
        run.print(f"replay: {args.replay_share:.0%} of the rows from {replay_path}")
        data = MixedData(data, open_if(replay_path), args.replay_share)
    plan = Plan(data, args, run, model)

    # 4. Optimizer, resume, wrapping
    optimizer = make_optimizer(model, args.optimizer, args.learning_rate, args.weight_decay)
    checkpoint = Checkpoint(run, f"lora_{args.lora_name}", model, optimizer, tokenizer, plan, args, (lora, init_from))
    start_step = checkpoint.start(args.resume)
    log = Log(run, checkpoint.log_path, args, model, plan.total_steps, start_step)
    model, optimizer = run.wrap(model, optimizer)
    if general_data and start_step == 0:
        log.validation(0, kind="general", **run.held_out(model, general_data, args.batch_size))

    # 5. The loop: one turn is one optimizer step, as in 3-full_sft.py
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
        if plan.due(step, args.val_interval) and not (stop and step + 1 < plan.total_steps):
            for kind, held_out in (("val", val_data), ("general", general_data)):
                if held_out:
                    log.validation(step + 1, kind=kind, **run.held_out(model, held_out, args.batch_size))
        if stop or plan.due(step, args.save_interval):
            checkpoint.save(step + 1, log.figures())
        if stop:
            break

    # 6. The end
    log.close()
    run.print(f"adapter: {checkpoint.path}")
    run.close()
    return run.exit_code


if __name__ == "__main__":
    run_main(main)
