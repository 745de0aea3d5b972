"""model/hf.py and scripts/merge_lora.py: merging, unmerging, folders for transformers, adapters for peft and back."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import SEVEN, TOKENIZER, save_adapter, save_base, trained

from model.checkpoint import file_sha256, load_model, read_adapter, read_base, read_meta
from model.cli import run_main
from model.hf import hf_config, hf_name, hf_value, our_name, save_folder
from model.LMConfig import LMConfig
from model.lora import LoRAConfig
from model.model import Transformer

os.environ["HF_HUB_OFFLINE"] = "1"
REPO = Path(__file__).resolve().parents[1]
IDS = torch.randint(3, 6400, (2, 24), generator=torch.Generator().manual_seed(5))
KINDS = ["dense", "moe"]
WHOLE = ("tok_embeddings", "output", "ffn_norm")


def load_script():
    spec = importlib.util.spec_from_file_location("merge_lora", REPO / "scripts/merge_lora.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = load_script()


class Place:
    """A folder like out/ with the weights full_sft of a tiny model, where adapters are made and the script is run."""

    def __init__(self, folder: Path, model: Transformer):
        self.folder, self.model, self.config = folder, model, model.config
        self.base = save_base(folder / f"full_sft_{self.config.name_suffix}.pth", model)

    def adapter(self, name: str, base: Path | None = None, **lora) -> Path:
        """A trained adapter's file, by default of the weights full_sft."""
        lora = LoRAConfig(**({"rank": 3, "alpha": 7} | lora))
        model, _ = load_model(base or self.base)
        state = trained(model, lora, seed=sum(name.encode()))
        file = self.folder / f"lora_{name}_{self.config.name_suffix}.pth"
        return save_adapter(file, state, lora, self.config, base or self.base)

    def run(self, *args: str | Path) -> None:
        size = "moe" if self.config.use_moe else "small"
        weights = [] if "--weight" in args else ["--weight", self.base]
        SCRIPT.main([str(arg) for arg in ["--out_dir", self.folder, "--size", size, *weights, *args]])

    def fails(self, capsys, *args: str | Path) -> str:
        """The one line on stderr with which the script ends as a program, with exit code 2."""
        capsys.readouterr()  # what came before
        with pytest.raises(SystemExit) as stop:
            run_main(lambda: self.run(*args))
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    def logits(self, path: Path, *adapters: Path) -> torch.Tensor:
        model, _ = load_model(path, adapters=list(adapters))
        with torch.no_grad():
            return model(IDS)[0]


@pytest.fixture
def place(tiny_model, tmp_path):
    def make(kind: str = "dense", **overrides) -> Place:
        (tmp_path / kind).mkdir()
        return Place(tmp_path / kind, tiny_model(**({"vocab_size": 6400, "use_moe": kind == "moe"} | overrides)))

    return make


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def assert_same_tensors(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def hf_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return hf_model(folder)(IDS).logits


def hf_model(folder: Path):
    from transformers import AutoModelForCausalLM

    width = json.loads((folder / "config.json").read_text())["intermediate_size"]
    # transformers' fast experts need rows of a multiple of 16 bytes
    odd = {} if width % 4 == 0 else {"experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, **odd).eval()


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


# Folders for transformers


@pytest.mark.parametrize(
    "overrides",
    [
        dict(),
        dict(n_kv_heads=4, hidden_dim=45, rope_theta=500.0, norm_eps=1e-2),
        dict(n_kv_heads=1, dim=24, hidden_dim=None, multiple_of=7),
        dict(use_moe=True),
        dict(use_moe=True, n_kv_heads=4, n_shared_experts=2, hidden_dim=33, rope_theta=500.0, norm_eps=1e-2),
        dict(use_moe=True, n_shared_experts=0, num_experts_per_tok=3, n_routed_experts=5),
        dict(use_moe=True, num_experts_per_tok=1),
        dict(use_moe=True, norm_topk_prob=False),
    ],
    ids=lambda overrides: ",".join(f"{name}={value}" for name, value in overrides.items()) or "plain",
)
def test_transformers_computes_the_same_logits(tiny_model, tmp_path, overrides):
    model = tiny_model(**({"vocab_size": 6400} | overrides))
    save_folder(tmp_path, model.state_dict(), model.config, TOKENIZER)
    with torch.no_grad():
        assert_close(hf_logits(tmp_path), model(IDS)[0])
    theirs = hf_model(tmp_path)
    assert type(theirs).__name__ == ("Qwen2MoeForCausalLM" if model.config.use_moe else "LlamaForCausalLM")
    assert theirs.dtype == torch.float32 and theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert (theirs.generation_config.bos_token_id, theirs.generation_config.eos_token_id) == (1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_holds_exactly_what_transformers_expects(place, tmp_path, kind):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "hf"
    place(kind).run("--output", folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    _, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    load_file(folder / "model.safetensors")  # the library finds the header in order


def test_the_folder_tokenizes_as_we_do(place, tmp_path):
    from transformers import AutoTokenizer

    place().run("--output", tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "你好，world! 1+1=2\n  学而时习之"
    assert theirs(text)["input_ids"] == TOKENIZER.encode(text)
    messages = [{"role": "system", "content": "用中文"}, {"role": "user", "content": "你是谁？"}]
    answered = [*messages, {"role": "assistant", "content": "MiniMind"}]
    for chat in (messages, messages[1:], answered):
        assert theirs.apply_chat_template(chat, tokenize=False) == TOKENIZER.render(chat)
        assert theirs.apply_chat_template(chat)["input_ids"] == TOKENIZER.encode_chat(chat)
    assert (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2, None)
    assert (tmp_path / "hf/tokenizer.json").read_bytes() == (TOKENIZER.directory / "tokenizer.json").read_bytes()


def test_names_and_values_go_back(tiny_model):
    for overrides in ({}, {"use_moe": True}):
        model = tiny_model(**overrides)
        for name, value in model.state_dict().items():
            assert our_name(hf_name(name)) == name
            module = name.removesuffix(".weight")
            theirs = hf_value(module, value, model.config)
            assert torch.equal(hf_value(module, theirs, model.config, back=True), value)
            changed = name.endswith(("wq.weight", "wk.weight", "shared_experts.w2.weight"))
            assert torch.equal(theirs, value) != changed, name
    rows = torch.arange(8.0)[:, None]  # one head of 8 channels
    assert hf_value("layers.0.attention.wq", rows, LMConfig(dim=16, n_heads=2, n_kv_heads=2)).flatten().tolist() == [
        *(0, 2, 4, 6),
        *(1, 3, 5, 7),
    ]


def test_half_a_folder_does_not_load(tiny_model, tmp_path, monkeypatch):
    model = tiny_model(vocab_size=6400)
    save_folder(tmp_path, model.state_dict(), model.config, TOKENIZER)
    before = (tmp_path / "model.safetensors").read_bytes()
    state = model.state_dict()
    state.pop("layers.1.feed_forward.w1.weight")
    with pytest.raises(KeyError):
        save_folder(tmp_path, state, model.config, TOKENIZER)
    assert not (tmp_path / "config.json").exists()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_config_of_a_router_with_one_choice():
    assert hf_config(LMConfig(use_moe=True))["norm_topk_prob"] is True
    assert hf_config(LMConfig(use_moe=True, num_experts_per_tok=1))["norm_topk_prob"] is False


# Merging


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low_mem", [[], ["--low_mem"]], ids=["whole", "low_mem"])
def test_merging_into_a_pth(place, tmp_path, kind, low_mem):
    here = place(kind)
    adapter = here.adapter("a", modules_to_save=WHOLE)
    output = tmp_path / "new" / "merged.pth"
    here.run("--lora", "a", "--output", output, *low_mem)
    assert_same_tensors(state_of(output), load_model(here.base, adapters=[adapter])[0].state_dict())
    state = state_of(output)
    assert state["output.weight"].data_ptr() == state["tok_embeddings.weight"].data_ptr()
    assert len({value.untyped_storage().data_ptr() for value in state.values()}) == len(state) - 1  # each its own
    meta = read_meta(output)
    assert meta["stage"] == "merged" and meta["config"] == here.config.to_dict()
    assert meta["tokenizer"] == TOKENIZER.fingerprint
    assert meta["base"] == {"file": here.base.name, "sha256": file_sha256(here.base)}
    assert meta["merged"] == [{"file": adapter.name, "sha256": file_sha256(adapter)}]
    assert (here.logits(output) - here.logits(here.base)).abs().max() > 0.1
    assert sorted(path.name for path in output.parent.iterdir()) == ["merged.json", "merged.pth"]


@pytest.mark.parametrize("kind", KINDS)
def test_low_mem_writes_the_same_folder(place, tmp_path, kind):
    here = place(kind)
    adapter = here.adapter("a", modules_to_save=WHOLE)
    here.run("--lora", "a", "--output", tmp_path / "one")
    here.run("--lora", "a", "--output", tmp_path / "two", "--low_mem")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    assert_close(hf_logits(tmp_path / "two"), here.logits(here.base, adapter))


def test_low_mem_writes_what_torch_save_writes(place, tmp_path):
    """Byte for byte: the same zip records, so that whatever reads .pth files reads these."""
    here = place()
    here.adapter("a")
    for name, flags in (("one", []), ("two", ["--low_mem"])):
        (tmp_path / name).mkdir()
        here.run("--lora", "a", "--output", tmp_path / name / "merged.pth", *flags)
    one, two = (tmp_path / name / "merged.pth" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert torch.load(two, mmap=True, weights_only=True).keys() == here.model.state_dict().keys()


@pytest.mark.parametrize("low_mem", [[], ["--low_mem"]], ids=["whole", "low_mem"])
def test_several_adapters_are_merged_one_after_the_other(place, tmp_path, low_mem):
    here = place("moe")
    files = [here.adapter("a", modules_to_save=("norm",)), here.adapter("b", targets=("wq", "experts"), rank=5)]
    both = tmp_path / "both.pth"
    here.run("--lora", "a,b", "--output", both, *low_mem)
    assert_same_tensors(state_of(both), load_model(here.base, adapters=files)[0].state_dict())
    assert [entry["file"] for entry in read_meta(both)["merged"]] == [file.name for file in files]

    first, second = tmp_path / "first.pth", tmp_path / "second.pth"
    here.run("--lora", "a", "--output", first, *low_mem)
    on_top = here.adapter("c", base=first, targets=("wq", "experts"), rank=5)
    here.run("--weight", first, "--lora", "c", "--output", second, *low_mem)
    meta = read_meta(second)
    assert [entry["file"] for entry in meta["merged"]] == [files[0].name, on_top.name]
    assert meta["base"]["file"] == here.base.name
    assert_same_tensors(state_of(second), load_model(first, adapters=[on_top])[0].state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low_mem", [[], ["--low_mem"]], ids=["whole", "low_mem"])
def test_unmerging_gives_the_base_back(place, tmp_path, kind, low_mem):
    here = place(kind)
    a, b = here.adapter("a"), here.adapter("b", targets=("attention",))
    merged, less, least = (tmp_path / f"{name}.pth" for name in ("merged", "less", "least"))
    here.run("--lora", "a,b", "--output", merged)
    here.run("--unmerge", "--weight", merged, "--lora", "b", "--output", less, *low_mem)
    here.run("--unmerge", "--weight", less, "--lora", "a", "--output", least, *low_mem)
    for found, wanted in ((less, load_model(here.base, adapters=[a])[0].state_dict()), (least, state_of(here.base))):
        for name, value in state_of(found).items():
            torch.testing.assert_close(value, wanted[name], atol=1e-6, rtol=0)
    name = "layers.0.attention.wq.weight"
    assert not torch.allclose(state_of(merged)[name], state_of(less)[name], atol=1e-3)
    assert [entry["sha256"] for entry in read_meta(less)["merged"]] == [file_sha256(a)]
    assert read_meta(least)["merged"] == [] and read_meta(least)["base"]["sha256"] == file_sha256(here.base)
    assert b.exists()


def test_unmerging_what_cannot_be(place, tmp_path, capsys):
    here = place()
    a, whole = here.adapter("a"), here.adapter("w", targets=("w1",), modules_to_save=("wq",))
    b = here.adapter("b", targets=("wv",))
    merged, output = tmp_path / "merged.pth", tmp_path / "base.pth"
    here.run("--lora", "b,w", "--output", merged)
    text = here.fails(capsys, "--unmerge", "--weight", merged, "--lora", "a", "--output", output)
    assert whole.name in text and file_sha256(whole)[:16] in text and file_sha256(a)[:16] in text
    assert file_sha256(b)[:16] in here.fails(capsys, "--unmerge", "--weight", merged, "--lora", "b", "--output", output)
    text = here.fails(capsys, "--unmerge", "--weight", merged, "--lora", "w", "--output", output)
    assert "replaced layers.0.attention.wq.weight as a whole" in text
    text = here.fails(capsys, "--unmerge", "--lora", "a", "--output", output)
    assert "full_sft_32.pth has no adapters to take out" in text
    assert "takes one adapter" in here.fails(capsys, "--unmerge", "--weight", merged, "--output", output)
    assert not output.exists() and not list(tmp_path.glob(".*"))


def test_what_two_adapters_replace_is_not_merged(place, tmp_path, capsys):
    here = place()
    here.adapter("a", modules_to_save=("norm", "tok_embeddings"))
    here.adapter("b", modules_to_save=("output",))
    here.adapter("c", targets=("w1",), modules_to_save=("wq",))
    output = tmp_path / "merged.pth"
    text = here.fails(capsys, "--lora", "a,b", "--output", output)
    assert "lora_b_32.pth replaces tok_embeddings.weight" in text and "lora_a_32.pth" in text
    text = here.fails(capsys, "--lora", "a,c", "--output", output)
    assert "lora_c_32.pth replaces layers.0.attention.wq.weight" in text
    here.run("--lora", "c,a", "--output", output)  # replaced first, then added to: nothing is lost


def test_nothing_is_replaced_unless_asked_for(place, tmp_path, capsys):
    here = place()
    adapter = here.adapter("a")
    file, folder, peft = tmp_path / "merged.pth", tmp_path / "hf", tmp_path / "peft"
    runs = [
        ("--lora", "a", "--output", file),
        ("--lora", "a", "--output", file, "--low_mem"),
        ("--lora", "a", "--output", folder),
        ("--lora", "a", "--to_peft", peft),
    ]
    for run in runs[::2]:
        here.run(*run)
    here.run(*runs[3])
    here.adapter("a", rank=2)  # another one of that name
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for run in runs:
        assert "exists; add --overwrite" in here.fails(capsys, *run)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for run in runs:
        here.run(*run, "--overwrite")
    assert_same_tensors(state_of(file), load_model(here.base, adapters=[adapter])[0].state_dict())
    assert_close(hf_logits(folder), here.logits(file))
    assert json.loads((peft / "adapter_config.json").read_text())["r"] == 2
    assert "is one of the files to read" in here.fails(capsys, "--lora", "a", "--output", here.base, "--overwrite")
    assert "is one of the files to read" in here.fails(capsys, "--lora", "a", "--output", adapter, "--overwrite")
    (tmp_path / "x.pth").mkdir()
    assert "is a folder" in here.fails(capsys, "--lora", "a", "--output", tmp_path / "x.pth", "--overwrite")
    (tmp_path / "x").write_text("")
    assert "is a file" in here.fails(capsys, "--lora", "a", "--output", tmp_path / "x", "--overwrite")


def test_wrong_use_is_one_line(place, tiny_model, tmp_path, capsys):
    here = place()
    file = here.adapter("a")
    other = save_base(here.folder / "other_32.pth", tiny_model(vocab_size=6400))
    output = tmp_path / "x.pth"
    cases = [
        (("--lora", "a"), "say where to write"),
        (("--lora", "a", "--to_peft", tmp_path, "--output", output), "takes no --output"),
        (("--output", output), "nothing to merge"),
        (("--lora", "b", "--output", output), "no adapter 'b'"),
        (("--lora", "a", "--output", tmp_path / "x.safetensors"), "end it in .pth"),
        (("--lora", "a", "--weight", "pretrain", "--output", output), "no weights 'pretrain'"),
        (("--lora", "a", "--weight", other, "--output", output), "was trained on full_sft_32.pth of sha256"),
        (("--lora", "a", "--weight", other, "--output", output, "--low_mem"), "was trained on full_sft_32.pth of"),
        (("--lora", "a", "--weight", file, "--output", output), "is an adapter; give it as --lora"),
        (("--lora", "a", "--weight", file, "--output", output, "--low_mem"), "is an adapter; give it as --lora"),
        (("--lora", other, "--output", output), "is no adapter"),
        (("--to_peft", tmp_path / "x"), "writes one adapter"),
        (("--from_peft", tmp_path, "--output", output), "adapter_config.json"),
        (("--from_peft", tmp_path, "--output", tmp_path / "x"), "is a .pth"),
        (("--from_peft", tmp_path, "--output", output, "--lora", "a"), "takes no --lora"),
        (("--to_peft", tmp_path, "--lora", "a", "--low_mem"), "--low_mem is for merging"),
        (("--lora", "a", "--output", output, "--base_folder", "x"), "--base_folder is for --to_peft"),
    ]
    for args, message in cases:
        assert message in here.fails(capsys, *args), args
    assert not output.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_low_mem_reads_v1_files(place, tmp_path, kind):
    """A state dict without .json, in float16, with a compiled model's names and an old file's masks."""
    here = place(kind)
    v1 = here.folder / "v1.pth"
    state = {f"_orig_mod.{name}": value.half() for name, value in here.model.state_dict().items()}
    torch.save(state | {"_orig_mod.layers.0.attention.mask": torch.ones(2, 2)}, v1)
    heads = ["--n_heads", "4", "--weight", v1]
    here.run(*heads, "--output", tmp_path / "one")
    here.run(*heads, "--output", tmp_path / "two", "--low_mem")
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert load_file(two)["model.norm.weight"].tolist() == here.model.norm.weight.half().float().tolist()

    torch.save(here.model.state_dict(), v1, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="old format, which cannot be mapped; leave --low_mem out"):
        here.run(*heads, "--output", tmp_path / "three", "--low_mem")
    for damage in (v1.read_bytes()[:5000], b"", b"no tensors"):
        v1.write_bytes(damage)
        with pytest.raises(ValueError, match="v1.pth is damaged"):
            here.run(*heads, "--output", tmp_path / "three", "--low_mem")


MEASURE = """
import json, sys, threading
sys.path[:0] = [{repo!r}, {repo!r} + "/tests"]
from test_merge import SCRIPT

def memory(field):  # in bytes; of this program alone, unlike ru_maxrss, which a child takes over from its parent
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

def watch():
    while not done.wait(0.001):
        peaks.append(memory("RssAnon"))

for arguments in {commands!r}:
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM, the peak of VmRSS, starts again
    done, peaks, own, all = threading.Event(), [], memory("RssAnon"), memory("VmRSS")
    watcher = threading.Thread(target=watch)
    watcher.start()
    SCRIPT.main(arguments)
    done.set()
    watcher.join()
    print(json.dumps([max(peaks) - own, memory("VmHWM") - all]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_low_mem_needs_less_memory_than_the_base(tmp_path):
    """Of all memory, pages of mapped files included, at most the base and two tensors; of its own, a few tensors.

    The system takes the pages of a mapped file back when it needs them; a program's own (RssAnon) it cannot.
    """
    here = Place(tmp_path, Transformer(LMConfig(dim=512, n_layers=6, n_heads=8, n_kv_heads=4, hidden_dim=1152)))
    (tmp_path / "small").mkdir()
    small = Place(tmp_path / "small", Transformer(LMConfig(dim=32, n_layers=1)))
    size = sum(parameter.numel() * 4 for parameter in here.model.parameters())
    tensor = 6400 * 512 * 4  # the largest
    commands = []
    for place, *output in (
        (small, "first.pth", "--low_mem"),  # whatever is imported or allocated once
        (here, "folder", "--low_mem"),
        (here, "merged.pth", "--low_mem"),
        (here, "whole.pth"),
    ):
        place.adapter("a", rank=4)
        output[0] = str(place.folder / output[0])
        given = ["--weight", str(place.base), "--lora", "a", "--out_dir", str(place.folder)]
        commands.append([*given, "--output", *output])
    code = MEASURE.format(repo=str(REPO), commands=commands)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    figures = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    for (own, total), command in zip(figures, commands, strict=True):
        print(f"base {size / 1e6:.1f} MB: {own / 1e6:.1f} own, {total / 1e6:.1f} in all: {command[7:]}")
    _, *low, (whole, _) = figures
    for own, total in low:
        assert total <= size + 2 * tensor
        assert own <= size / 2
    assert low[0][1] <= size / 2  # into a folder: without a temporary file
    assert whole > size  # that the measure measures


def test_it_runs_from_any_folder(place, tmp_path):
    here = place()
    here.adapter("a")
    command = [sys.executable, str(REPO / "scripts/merge_lora.py"), "--weight", str(here.base), "--out_dir"]
    command += [str(here.folder), "--lora", "a", "--output", "merged.pth"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (tmp_path / "merged.pth").exists() and (tmp_path / "merged.json").exists()
    assert done.stdout == "full_sft_32.pth with lora_a_32.pth: merged.pth\n"
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: merged.pth exists; add --overwrite to replace it\n"


# peft


def peft_model(here: Place, folder: Path):
    """The base in transformers with the adapter in `folder` on top, as peft loads it."""
    peft = pytest.importorskip("peft")
    base = here.folder / "hf"
    if not base.exists():
        here.run("--output", base)
    return peft.PeftModel.from_pretrained(hf_model(base), folder).eval()


@pytest.mark.filterwarnings("ignore:The following rank_pattern:RuntimeWarning")  # peft overlooks target_parameters
@pytest.mark.filterwarnings("ignore:The following alpha_pattern:RuntimeWarning")
@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("dense", dict(targets=SEVEN)),
        ("dense", dict(targets=SEVEN, modules_to_save=("tok_embeddings", "output"), dropout=0.25)),
        ("dense", dict(targets=("w2", "wq"), modules_to_save=("wk", "norm", "ffn_norm"))),
        ("moe", dict(targets=SEVEN)),
        ("moe", dict(targets=("attention", "shared_experts"), modules_to_save=("output", "gate"), dropout=0.25)),
        ("moe", dict(targets=("experts",))),
        ("moe", dict(targets=("w2",), modules_to_save=("attention", "norm"))),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(sum(map(tuple, list(value.values())[:2]), ())),
)
def test_peft_computes_the_same_logits_and_the_adapter_comes_back(place, tmp_path, kind, lora):
    here = place(kind)
    file = here.adapter("a", **lora)
    here.run("--lora", "a", "--to_peft", tmp_path / "peft", "--base_folder", "some/folder")
    theirs = peft_model(here, tmp_path / "peft")
    wanted = here.logits(here.base, file)
    assert (wanted - here.logits(here.base)).abs().max() > 0.1
    with torch.no_grad():
        assert_close(theirs(IDS).logits, wanted)
    if "tok_embeddings.weight" in state_of(file):  # trained on, they stay one
        inner = theirs.get_base_model()
        assert inner.lm_head.weight is inner.model.embed_tokens.weight
    values = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (values["task_type"], values["base_model_name_or_path"]) == ("CAUSAL_LM", "some/folder")
    assert values["lora_dropout"] == lora.get("dropout", 0.0)

    copy = here.folder / f"lora_copy_{here.config.name_suffix}.pth"
    here.run("--from_peft", tmp_path / "peft", "--output", copy)
    assert_same_tensors(state_of(copy), state_of(file))
    state, settings, meta = read_adapter(copy, here.base, here.config, TOKENIZER)
    assert (settings.rank, settings.alpha, settings.dropout) == (3, 7, lora.get("dropout", 0.0))
    assert meta["stage"] == "lora_copy" and meta["base"]["file"] == here.base.name
    assert torch.equal(here.logits(here.base, copy), wanted)


@pytest.mark.parametrize(("kind", "targets"), [("dense", SEVEN), ("moe", SEVEN), ("dense", ("w1", "wq"))])
def test_settings_come_back(place, tmp_path, kind, targets):
    here = place(kind)
    file = here.adapter("a", targets=targets, modules_to_save=("ffn_norm", "tok_embeddings"))
    here.run("--lora", "a", "--to_peft", tmp_path / "peft")
    here.run("--from_peft", tmp_path / "peft", "--output", tmp_path / "copy.pth")
    before, after = (read_adapter(path, here.base, here.config)[1] for path in (file, tmp_path / "copy.pth"))
    assert set(after.targets) == set(before.targets)
    assert set(after.modules_to_save) == set(before.modules_to_save)


def test_targets_in_peft_are_short_and_meet_nothing_else(place, tmp_path):
    here = place("moe")
    here.adapter("a", targets=("attention", "shared_experts"), modules_to_save=("norm", "gate"))
    here.run("--lora", "a", "--to_peft", tmp_path / "peft")
    values = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    shared = [f"shared_expert.{name}_proj" for name in ("gate", "down", "up")]
    assert values["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", *shared]
    assert sorted(values["modules_to_save"]) == ["mlp.gate", "model.norm"]


def test_routed_experts_allow_no_dropout(place, tmp_path, capsys):
    here = place("moe")
    here.adapter("a", dropout=0.1)
    here.run("--lora", "a", "--to_peft", tmp_path / "peft")
    assert "lora_dropout is 0 instead of 0.1" in capsys.readouterr().out
    peft_model(here, tmp_path / "peft")


def test_what_peft_cannot_express_is_named(place, tmp_path, capsys):
    here = place("moe")
    here.adapter("a", targets=("w1", "wq"))
    text = here.fails(capsys, "--lora", "a", "--to_peft", tmp_path / "peft")
    assert "layers.0.feed_forward.experts.0.w1, layers.0.feed_forward.experts.1.w1" in text
    here.adapter("b", targets=("wq",), modules_to_save=("experts",))
    text = here.fails(capsys, "--lora", "b", "--to_peft", tmp_path / "peft")
    assert "layers.0.feed_forward.experts.0.w1" in text
    assert not (tmp_path / "peft").exists()


def made_by_peft(here: Place, folder: Path, **settings) -> torch.Tensor:
    """Writes an adapter that peft made, and returns its logits."""
    peft = pytest.importorskip("peft")
    if not (here.folder / "hf").exists():
        here.run("--output", here.folder / "hf")
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(hf_model(here.folder / "hf"), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1 * torch.randn_like(parameter)
            elif "lora_B" in name:  # small enough for float32 to be exact about
                parameter *= 0.1
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("dense", dict(target_modules="all-linear")),
        ("dense", dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
        ("moe", dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])),
        ("moe", dict(target_modules=["down_proj"], target_parameters=["mlp.experts.down_proj"])),
    ],
)
def test_adapters_that_peft_made_are_read(place, tmp_path, kind, settings):
    here = place(kind)
    wanted = made_by_peft(here, tmp_path / "peft", **settings)
    assert (wanted - here.logits(here.base)).abs().max() > 0.01
    file = here.folder / f"lora_x_{here.config.name_suffix}.pth"
    here.run("--from_peft", tmp_path / "peft", "--output", file)
    assert_close(here.logits(here.base, file), wanted)


def test_adapters_of_peft_that_ours_cannot_be_are_refused(place, tmp_path, capsys):
    here = place()
    settings = dict(modules_to_save=["embed_tokens", "norm"], ensure_weight_tying=True)
    made_by_peft(here, tmp_path / "good", target_modules=["q_proj", "v_proj"], **settings)
    tensors = load_file(tmp_path / "good/adapter_model.safetensors")
    values = json.loads((tmp_path / "good/adapter_config.json").read_text())
    (tmp_path / "bad").mkdir()
    prefix = "base_model.model.model."
    some = f"{prefix}layers.0.self_attn.q_proj.lora_B.weight"
    without_head = {name: value for name, value in tensors.items() if "lm_head" not in name}
    apart = tensors | {"base_model.model.lm_head.weight": tensors[f"{prefix}embed_tokens.weight"] + 1}
    cases = [
        ({"use_rslora": True}, tensors, "use_rslora=True"),
        ({"use_dora": True}, tensors, "use_dora=True"),
        ({"bias": "all"}, tensors, "bias='all'"),
        ({"peft_type": "IA3"}, tensors, "no LoRA adapter"),
        ({"r": None}, tensors, "must have peft_type LORA, r and lora_alpha"),
        ({"init_lora_weights": "pissa"}, tensors, "changes the base weights"),
        ({"alpha_pattern": {"v_proj": 8}}, tensors, "scales v_proj otherwise"),
        ({"r": 8, "lora_alpha": 12}, tensors, "does not fit: layers.0.attention.wq.lora_A.weight is (4, 32)"),
        ({}, without_head, "embed_tokens and lm_head apart"),
        ({}, apart, "embed_tokens and lm_head apart"),
        ({}, {name: value for name, value in tensors.items() if "layers.1" not in name}, "and not all like it"),
        ({}, {name: value for name, value in tensors.items() if name != some}, "wq.lora_B.weight is missing"),
        ({}, tensors | {f"{prefix}layers.0.self_attn.q_proj.bias": torch.ones(32)}, "does not have"),
        ({}, tensors | {f"{prefix}layers.0.x_proj.lora_A.weight": torch.ones(4, 32)}, "does not have or cannot adapt"),
        ({}, tensors | {f"{prefix}embed_tokens.lora_A.weight": torch.ones(4, 32)}, "does not have or cannot adapt"),
        ({}, {}, "at least one target"),
    ]
    output = tmp_path / "x.pth"
    for change, state, message in cases:
        (tmp_path / "bad/adapter_config.json").write_text(json.dumps(values | change))
        save_file({name: value.clone() for name, value in state.items()}, tmp_path / "bad/adapter_model.safetensors")
        assert message in here.fails(capsys, "--from_peft", tmp_path / "bad", "--output", output), message
    (tmp_path / "bad/adapter_model.safetensors").write_bytes(b"12345678901234567890")
    assert "holds no adapter of peft" in here.fails(capsys, "--from_peft", tmp_path / "bad", "--output", output)
    (tmp_path / "bad/adapter_config.json").write_text("{")
    assert "holds no adapter of peft" in here.fails(capsys, "--from_peft", tmp_path / "bad", "--output", output)
    assert not output.exists()


def test_stacked_experts_that_mix_w1_and_w3_are_refused(place, tmp_path, capsys):
    here = place("moe")
    here.adapter("a", targets=("experts",))
    here.run("--lora", "a", "--to_peft", tmp_path / "peft")
    path = tmp_path / "peft/adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight"
    output = tmp_path / "x.pth"
    save_file(tensors | {name: torch.ones_like(tensors[name])}, path)
    text = here.fails(capsys, "--from_peft", tmp_path / "peft", "--output", output)
    assert "gate_up_proj has rank 6 and mixes w1 with w3" in text
    tensors.pop(name)
    save_file(tensors, path)
    text = here.fails(capsys, "--from_peft", tmp_path / "peft", "--output", output)
    assert "lora_A or lora_B of model.layers.1.mlp.experts.gate_up_proj is missing" in text
    values = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps(values | {"target_parameters": None}))
    text = here.fails(capsys, "--from_peft", tmp_path / "peft", "--output", output)
    assert "target_parameters does not say" in text


def test_trained_biases_are_refused(place, tmp_path, capsys):
    here = place("moe")
    here.adapter("a", targets=("wo",), modules_to_save=("wq",))
    here.run("--lora", "a", "--to_peft", tmp_path / "peft")
    path = tmp_path / "peft/adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.q_proj.bias"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name] + 1}, path)
    text = here.fails(capsys, "--from_peft", tmp_path / "peft", "--output", tmp_path / "x.pth")
    assert "trains model.layers.0.self_attn.q_proj.bias, which this toolkit's model does not have" in text


def test_the_base_that_was_read_is_whole(place, tmp_path):
    """A merged file is weights like any other: read strictly, merged into again, and its adapters are its own."""
    here = place()
    here.adapter("a")
    here.run("--lora", "a", "--output", tmp_path / "merged.pth")
    _, config, meta = read_base(tmp_path / "merged.pth", TOKENIZER)
    assert config == here.config and "lora" not in meta
    with pytest.raises(ValueError, match="was trained on full_sft_32.pth"):
        here.run("--weight", tmp_path / "merged.pth", "--lora", "a", "--output", tmp_path / "again.pth")
