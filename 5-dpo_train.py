"""DPO: a chat model learns from pairs of answers which one is preferred.

Reads   out/full_sft_{dim}[_moe].pth, dataset/dpo/train_data.json (prompt, chosen, rejected)
Writes  out/rl_{dim}[_moe].pth with .json (what it is), .jsonl (log), _resume.pth (to continue), _ref.pth (the
        reference's log-probabilities); with --lora NAME out/lora_{NAME}_{dim}[_moe].pth, an adapter alone
Run     python 5-dpo_train.py                                 one device, or the CPU
        torchrun --nproc_per_node 2 5-dpo_train.py            several devices; also --fsdp, --deepspeed
Next    python 2-eval.py --weight rl to chat with it

DPO：用成对的回答让对话模型学会哪个更好。
读入    out/full_sft_{dim}[_moe].pth、dataset/dpo/train_data.json（prompt、chosen、rejected）
写出    out/rl_{dim}[_moe].pth，以及 .json、.jsonl（日志）、_resume.pth（断点）、_ref.pth（参考模型的对数概率）；
        加 --lora NAME 时只写适配器 out/lora_{NAME}_{dim}[_moe].pth
运行    python 5-dpo_train.py；torchrun --nproc_per_node 2 5-dpo_train.py（多卡；可加 --fsdp、--deepspeed）
下一步  python 2-eval.py --weight rl 与它对话
"""

import argparse
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from model import cli
from model.checkpoint import Checkpoint, file_sha256, find_weights, load_model
from model.dataset import DPOData, SFTData
from model.LMConfig import SIZES
from model.log import Log
from model.lora import LoRAConfig, add_adapter, trainable_table
from model.optim import cosine_lr, make_optimizer, set_lr
from model.preference import FIGURES, Reference, Scores, figures, held_out_pairs, score
from model.runtime import Plan, Run
from model.tokenizer import load_tokenizer


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=SIZES, default="small", help="model size (default: small, 26M)")
    add("--init_from", help="a .pth, or a stage's name in --out_dir, to start from (default: full_sft)")
    add("--beta", type=cli.positive_float, default=0.1, help="how much a log-ratio counts as reward (default: 0.1)")
    add("--loss", choices=["sigmoid", "ipo", "hinge"], default="sigmoid", help="(default: sigmoid, which is DPO)")
    add(
        "--label_smoothing",
        type=cli.number(float, 0, 0.49),
        default=0.0,
        help="with sigmoid: the share of pairs whose preference may be wrong (default: 0)",
    )
    add(
        "--sft_coef",
        type=cli.non_negative_float,
        default=0.0,
        help="weight of the chosen answers' own loss, which is not in the log's loss (default: 0)",
    )
    add(
        "--ref_cache",
        help="file of the reference's log-probabilities; '': a second model, not sharded (default: in --out_dir)",
    )
    add("--lora", type=cli.adapter_name, metavar="NAME", help="train only an adapter of this name")
    cli.add_adapter_flags(parser)
    cli.add_general_flag(parser)
    cli.add_training_flags(
        parser,
        learning_rate=4e-5,
        epochs=2,
        batch_size=8,
        data="dpo/train_data.json",
        wandb_project="MiniMind-DPO",
        weight_decay=0.0,
    )
    args = parser.parse_args(argv)
    if args.label_smoothing and args.loss != "sigmoid":
        parser.error("--label_smoothing goes with --loss sigmoid")
    if not args.lora:
        defaults = vars(parser.parse_args([]))
        for name in ("rank", "alpha", "dropout", "target", "modules_to_save"):
            if getattr(args, name) != defaults[name]:
                parser.error(f"--{name} is of an adapter; give --lora NAME too")
    return args


def preference_loss(scores: Scores, args: argparse.Namespace) -> Tensor:
    """The loss of every pair, (R,).

    h = log p(chosen) / p_ref(chosen) - log p(rejected) / p_ref(rejected), e = label_smoothing
    sigmoid   -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)   Rafailov et al. 2023, "DPO", equation 7
    hinge     max(0, 1 - beta h)                                      Zhao et al. 2023, "SLiC-HF"
    ipo       (h - 1 / (2 beta))^2, log-ratios as means a token       Azar et al. 2023, equation 17
    """
    log_ratios = scores.log_ratios / scores.lengths if args.loss == "ipo" else scores.log_ratios
    chosen, rejected = log_ratios.chunk(2)
    h = chosen - rejected
    if args.loss == "ipo":
        return (h - 1 / (2 * args.beta)).square()
    if args.loss == "hinge":
        return F.relu(1 - args.beta * h)
    e = args.label_smoothing
    return -(1 - e) * F.logsigmoid(args.beta * h) - e * F.logsigmoid(-args.beta * h)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    # 1. Where we run
    run = Run(args)

    # 2. The model; what it is now is the reference that it is compared with
    tokenizer = load_tokenizer(args.tokenizer_dir)
    init_from = find_weights(args.init_from or "full_sft", args.out_dir, args.size)
    model, _ = load_model(init_from, tokenizer=tokenizer)
    run.print(f"starting from {init_from}")
    lora = LoRAConfig(args.rank, args.alpha, args.dropout, args.target, args.modules_to_save)
    if args.lora:
        add_adapter(model, lora)
        run.print(trainable_table(model))
    run.place(model, args)

    # 3. The data: pairs of conversations that differ in the last answer, which alone is scored
    def open_data(cls, path):
        return run.main_first(lambda: cls(path, tokenizer, args.max_seq_len, seed=args.seed, workers=args.num_workers))

    data = open_data(DPOData, args.data_path)
    val_path, general_path = cli.resolve_val_path(args), cli.if_there(args.general_path, "general_val.csv")
    run.print(f"pairs not used: {data.stats['not used'] or 'none'}; cut: {data.stats['pairs cut']}")
    run.print(f"held-out pairs: {val_path or 'none'}; general instructions: {general_path or 'none'}")
    pairs = {"train": data} | ({"val": open_data(DPOData, val_path)} if val_path else {})
    general = open_data(SFTData, general_path) if general_path else None
    plan = Plan(data, args, run, model)

    # 4. Optimizer, resume, the reference, wrapping
    optimizer = make_optimizer(model, args.optimizer, args.learning_rate, args.weight_decay)
    stage, adapter = (f"lora_{args.lora}", (lora, init_from)) if args.lora else ("rl", None)
    objective = {name: getattr(args, name) for name in ("beta", "loss", "label_smoothing", "sft_coef")}
    objective["reference"] = file_sha256(init_from)
    checkpoint = Checkpoint(run, stage, model, optimizer, tokenizer, plan, args, adapter, objective)
    cache = Path(args.out_dir) / f"{checkpoint.path.stem}_ref.pth" if args.ref_cache is None else args.ref_cache
    about = {"weights": objective["reference"], "tokenizer": tokenizer.fingerprint, "dtype": str(run.dtype)}
    about |= {"max_seq_len": args.max_seq_len}
    reference = Reference(run, model, pairs, Path(cache) if cache else None, about)
    start_step = checkpoint.start(args.resume)
    log = Log(run, checkpoint.log_path, args, model, plan.total_steps, start_step)
    model, optimizer = run.wrap(model, optimizer)

    def measure(step):
        if "val" in pairs:
            settings = args.batch_size, args.beta, lambda scores: preference_loss(scores, args)
            log.pairs(step, **held_out_pairs(run, model, reference, pairs["val"], *settings))
        if general:
            log.validation(step, kind="general", **run.held_out(model, general, args.batch_size))

    if start_step == 0:
        measure(0)

    # 5. The loop: one turn is one optimizer step
    for step in range(start_step, plan.total_steps):
        lr = cosine_lr(step, plan.total_steps, plan.warmup_steps, args.learning_rate)
        set_lr(optimizer, lr)
        batches = plan.batches(step)
        num_pairs = run.sum(sum(batch.num_pairs for batch in batches))
        num_chosen = run.sum(sum(batch.num_chosen for batch in batches))  # target tokens
        num_tokens = run.sum(sum(batch.num_tokens for batch in batches))
        totals = step_aux = 0.0
        for i, batch in enumerate(batches):
            with run.sync_grads(model, last=i == len(batches) - 1):
                scores = score(run, model, reference, "train", batch)
                losses = preference_loss(scores, args)
                # this micro-batch's share of ONE mean over the step's pairs, and over its chosen answers' tokens
                loss = losses.sum() / num_pairs
                loss = loss - args.sft_coef * scores.log_probs.chunk(2)[0].sum() / num_chosen
                aux = scores.aux * len(batch.pairs) / plan.rows_per_step  # balance of the experts, a mean over pairs
                run.backward(loss + aux)
            totals += figures(scores, losses, args.beta)
            step_aux += aux.detach()
        step_loss, *means = (value / num_pairs for value in run.sum(totals))
        grad_norm = run.step(model, optimizer, args.grad_clip)
        run.check_finite(step_loss, grad_norm, f"step {step + 1}, learning rate {lr:.2e}, {plan.position(step)}")
        more = dict(zip(FIGURES[1:], means, strict=True))
        load = run.unwrap(model).expert_load()
        log.step(step + 1, step_loss, lr, grad_norm, num_tokens, run.sum(step_aux), load, **more)

        stop = run.should_stop()
        if plan.due(step, args.val_interval) and not (stop and step + 1 < plan.total_steps):
            measure(step + 1)
        if stop or plan.due(step, args.save_interval):
            checkpoint.save(step + 1, log.figures())
        if stop:
            break

    # 6. The end
    log.close()
    run.print(f"{'adapter' if args.lora else 'weights'}: {checkpoint.path}")
    run.close()
    return run.exit_code


if __name__ == "__main__":
    cli.run_main(main)
