"""DPOData: preference pairs as batches. MixedData: an earlier stage's rows among new ones."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_dataset import BOS, EOS, byte_tokenizer, caches, chat, ids, some_texts, write_jsonl

from model import dataset
from model.dataset import IGNORE, DPOData, MixedData, PairBatch, SFTData
from model.tokenizer import Tokenizer

FRAME = len(ids("{s}user\n{e}\n{s}assistant\n"))  # what the template puts around a question


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def dpo(tmp_path: Path, tokenizer, pairs: list[dict], max_seq_len: int, **options) -> DPOData:
    return DPOData(write_jsonl(tmp_path / "d.jsonl", pairs), tokenizer, max_seq_len, **options)


def pair(prompt: str | list[dict], chosen: str, rejected: str) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def some_pairs(n: int, seed: int = 0) -> list[dict]:
    return [
        pair(text, text[::-1] + "+" * (i % 7), "no" + "-" * (i % 5)) for i, text in enumerate(some_texts(n, 30, seed))
    ]


def sequences(batch: PairBatch) -> list[tuple[list[int], list[int]]]:
    """(all ids, those with a label) of every row that is not padding, the last label put behind the inputs."""
    found = []
    for inputs, labels, documents in zip(batch.input_ids, batch.labels, batch.documents, strict=True):
        length = int(documents.sum())
        assert documents.tolist() == [1] * length + [0] * (len(documents) - length)
        assert not inputs[length:].any() and (labels[length:] == IGNORE).all()
        if length:
            scored = labels[labels != IGNORE].tolist()
            row = inputs[:length].tolist() + labels[length - 1 : length].tolist()
            assert row[len(row) - len(scored) :] == scored, "the labels are one run, up to the end"
            found.append((row, scored))
    return found


def answers(batch: PairBatch) -> list[tuple]:
    """(number, scored ids of the chosen, of the rejected) of every pair."""
    scored = [tuple(scored) for _, scored in sequences(batch)]
    half = len(scored) // 2
    assert half == batch.num_pairs
    return list(zip(batch.pairs[:half].tolist(), scored[:half], scored[half:], strict=True))


# ------------------------------------------------------------------------------------------------ DPOData


def test_a_pair_written_by_hand(tmp_path, tokenizer):
    data = dpo(tmp_path, tokenizer, [pair("Q", "AB", "C")], 64)
    batch = data.rows(0, 0, 1)
    prompt, no = ids("{s}user\nQ{e}\n{s}assistant\n"), [IGNORE]
    assert batch.input_ids.tolist() == [prompt + ids("AB"), prompt + ids("C") + [0]]
    before = no * (len(prompt) - 1)
    assert batch.labels.tolist() == [before + ids("AB{e}"), before + ids("C{e}") + no]
    assert batch.documents.tolist() == [[1] * (len(prompt) + 2), [1] * (len(prompt) + 1) + [0]]
    assert batch.pairs.tolist() == [0]
    assert [x.dtype for x in batch] == [torch.int64, torch.int64, torch.int32, torch.int64]
    assert (batch.num_targets, batch.num_tokens, batch.num_pairs) == (5, 2 * len(prompt) + 3, 1)
    assert (data.num_rows, data.num_tokens, data.num_bytes) == (1, 5, 3)
    moved = batch.to("cpu")
    assert type(moved) is PairBatch and all(torch.equal(a, b) for a, b in zip(moved, batch, strict=True))


def test_only_the_last_answer_of_a_conversation_is_scored_and_the_ids_are_the_templates(tmp_path, tokenizer):
    prompt = chat("one", "two", "three", "four", "five", system="SYS")
    data = dpo(tmp_path, tokenizer, [pair(prompt, "good", "worse answer")], 500)
    assert sequences(data.rows(0, 0, 1)) == [
        (tokenizer.encode_chat([*prompt, {"role": "assistant", "content": text}])[:-1], ids(text + "{e}"))  # no "\n"
        for text in ("good", "worse answer")
    ]
    assert data.stats["pairs"] == 1 and data.stats["prompts cut"] == data.stats["pairs cut"] == 0


def test_every_format_of_a_pair_gives_the_same(tmp_path, tokenizer):
    forms = [
        pair("q", "good", "bad"),
        pair(chat("q"), "good", "bad"),
        {"chosen": chat("q", "good"), "rejected": chat("q", "bad")},
        {"conversations": chat("q"), "chosen": chat("", "good")[1], "rejected": chat("", "bad")[1]},
    ]
    rows = sequences(dpo(tmp_path, tokenizer, forms, 64).in_order(0, 4))
    assert len(rows) == 8 and len({tuple(row) for row, _ in rows[:4]}) == len({tuple(row) for row, _ in rows[4:]}) == 1


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_the_oldest_turns_go_first_and_for_both_sides_alike(tmp_path, tokenizer, longer):
    prompt = chat("q" * 5, "a" * 5, "r" * 5, "b" * 5, "s" * 5, system="SYS")
    long, short = "x" * 20, "y"
    both = (long, short) if longer == "chosen" else (short, long)
    turn = FRAME + 5 + 5 + len(ids("{e}\n"))
    whole = 3 + 2 * turn + FRAME + 5 + len(long) + 1 - 1  # the last id is only a label
    kept = {}
    for max_seq_len in (whole, whole - 1, whole - turn, whole - turn - 1, whole - 2 * turn):
        data = dpo(tmp_path, tokenizer, [pair(prompt, *both)], max_seq_len)
        rows = sequences(data.rows(0, 0, 1))
        heads = [row[: len(row) - len(scored)] for row, scored in rows]
        assert heads[0] == heads[1] and heads[0][:4] == ids("SYS{s}")
        assert [scored for _, scored in rows] == [ids(text + "{e}") for text in both]
        assert data.stats["pairs cut"] == 0
        kept[max_seq_len - whole] = tokenizer.decode(heads[0]).count("user"), data.stats["prompts cut"]
    assert kept == {0: (3, 0), -1: (2, 1), -turn: (2, 1), -turn - 1: (1, 1), -2 * turn: (1, 1)}


def test_answers_that_do_not_fit_are_cut_at_the_same_length(tmp_path, tokenizer):
    prompt = chat("old", "older", "q", system="S")
    head = 1 + FRAME + 1
    made = {}
    for room in (7, 6, 5, 4, 1):
        data = dpo(tmp_path, tokenizer, [pair(prompt, "abcdef", "xyz")], head + room - 1)
        assert [row[:head] for row, _ in sequences(data.rows(0, 0, 1))] == [ids("S{s}user\nq{e}\n{s}assistant\n")] * 2
        ((_, chosen, rejected),) = answers(data.rows(0, 0, 1))
        made[room] = tokenizer.decode(chosen, skip_special=False), tokenizer.decode(rejected, skip_special=False)
        assert data.stats["pairs cut"] == (room < 7) and data.stats["prompts cut"] == 1
        assert data.num_tokens == len(chosen) + len(rejected)
        assert data.num_bytes == sum(len(text.removesuffix("</s>")) for text in made[room])
    assert made == {
        7: ("abcdef</s>", "xyz</s>"),
        6: ("abcdef", "xyz</s>"),
        5: ("abcde", "xyz</s>"),
        4: ("abcd", "xyz</s>"),
        1: ("a", "x"),
    }


def test_what_no_cut_can_save_is_left_out_and_counted(tmp_path, tokenizer, capsys):
    room = 4
    pairs = [
        pair("q" * 100, "a", "b"),  # no room for an answer
        pair("q" * (room + 1), "a", "b"),
        pair("q", "same then good", "same then bad"),  # equal as far as they fit
        pair("q", "good", "bad"),
    ]
    data = dpo(tmp_path, tokenizer, pairs, FRAME + 1 + room - 1)
    assert data.num_rows == 1 and data.stats["pairs"] == 1
    assert data.stats["not used"] == {"too long": 3} and data.stats["pairs cut"] == 1
    assert answers(data.rows(0, 0, 1)) == [(0, tuple(ids("good")), tuple(ids("bad{e}")))]
    assert "3 records not used: 3 too long" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"nothing to train on.*\{\"prompt\", \"chosen\", \"rejected\"\}"):
        dpo(tmp_path, tokenizer, pairs[:1], 32)


def test_pairs_without_a_preference_are_counted_by_kind(tmp_path, tokenizer, capsys):
    pairs = [
        pair("q", "good", ""),
        pair("q", " \n", "bad"),
        pair("q", "same", "same"),
        pair("q", "good", "bad"),
        {"prompt": "q", "chosen": "good"},
        pair("", "good", "bad"),
    ]
    data = dpo(tmp_path, tokenizer, pairs, 64)
    assert data.num_rows == 1 and data.in_order(0, 1).pairs.tolist() == [0]
    assert data.stats["not used"] == {
        "empty rejected": 1,
        "empty chosen": 1,
        "no preference": 1,
        "no key 'rejected'": 1,
        "empty user turn": 1,
    }
    assert "d.jsonl:1: empty rejected" in capsys.readouterr().err
    json.dumps(data.stats)


def test_every_pair_comes_once_an_epoch_in_another_order(tmp_path, tokenizer):
    pairs = some_pairs(60)
    data = dpo(tmp_path, tokenizer, pairs, 128)
    expected = [(i, tuple(ids(p["chosen"] + "{e}")), tuple(ids(p["rejected"] + "{e}"))) for i, p in enumerate(pairs)]
    epochs = [answers(data.rows(epoch, 0, 60)) for epoch in range(3)]
    assert all(sorted(found) == expected for found in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and expected not in epochs
    assert data.num_tokens == sum(len(a) + len(b) for _, a, b in expected) == data.rows(0, 0, 60).num_targets
    assert data.num_bytes == sum(len(p["chosen"] + p["rejected"]) for p in pairs)
    assert data.stats["target_tokens"] == data.num_tokens and data.stats["rows"] == data.num_rows == 60

    same, other = dpo(tmp_path, tokenizer, pairs, 128), dpo(tmp_path, tokenizer, pairs, 128, seed=7)
    assert answers(same.rows(1, 0, 60)) == epochs[1] != answers(other.rows(1, 0, 60))
    assert same.fingerprint == data.fingerprint
    assert dpo(tmp_path, tokenizer, pairs[1:], 128).fingerprint != data.fingerprint


def test_pairs_do_not_depend_on_how_they_are_asked_for(tmp_path, tokenizer):
    data = dpo(tmp_path, tokenizer, some_pairs(20), 128)
    whole = answers(data.rows(0, 0, 20))
    for step in (1, 3, 8):
        parts = [answers(data.rows(0, start, start + step)) for start in range(0, 20, step)]
        assert [found for part in parts for found in part] == whole
        data.rows(1, 0, 1)


def test_a_batch_is_padded_to_its_own_longest_sequence_only(tmp_path, tokenizer):
    pairs = [pair("q" * n, "good", "bad" * n) for n in (1, 2, 30)]
    data = dpo(tmp_path, tokenizer, pairs, 500)
    for i, n in enumerate((1, 2, 30)):
        assert data.in_order(i, i + 1).input_ids.shape == (2, FRAME + n + max(4, 3 * n))
    assert data.in_order(0, 3).input_ids.shape == (6, FRAME + 120)


def test_rows_past_the_end_are_padding(tmp_path, tokenizer):
    data = dpo(tmp_path, tokenizer, some_pairs(5), 128)
    batch = data.rows(0, 3, 7)
    assert batch.pairs.tolist()[2:] == [-1, -1] and (batch.pairs[:2] >= 0).all() and batch.num_pairs == 2
    for start in (2, 6):  # behind the chosen, behind the rejected
        assert not batch.input_ids[start : start + 2].any() and not batch.documents[start : start + 2].any()
        assert (batch.labels[start : start + 2] == IGNORE).all()
    assert batch.documents[4:6].any(1).all() and len(answers(batch)) == 2
    for empty in (data.rows(0, 9, 11), data.in_order(9, 11)):
        assert empty.input_ids.shape == (4, 1) and empty.pairs.tolist() == [-1, -1]
        assert (empty.num_targets, empty.num_tokens, empty.num_pairs) == (0, 0, 0)


def test_padding_and_prompts_are_never_labels(tmp_path, tokenizer):
    batch = dpo(tmp_path, tokenizer, some_pairs(40), 128).rows(0, 0, 48)
    scored = batch.labels != IGNORE
    assert not scored[batch.documents == 0].any() and not (batch.labels == BOS).any()
    assert ((batch.labels == EOS).sum(1) == (batch.documents[:, 0] > 0)).all()  # one, that of the last answer


def test_in_order_gives_every_pair_under_the_number_that_rows_gives(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(dataset, "BATCH_CHARS", 100)  # many batches, encoded by several threads
    pairs = some_pairs(50)
    pairs[10] = pair("q", "same", "same")  # not counted
    data = dpo(tmp_path, tokenizer, pairs, 128, workers=4)
    found = [answer for start in range(0, 49, 10) for answer in answers(data.in_order(start, start + 10))]
    assert [number for number, *_ in found] == list(range(49))
    assert [chosen for _, chosen, _ in found] == [tuple(ids(p["chosen"] + "{e}")) for p in pairs if p["prompt"] != "q"]
    assert all(found[number] == (number, chosen, rejected) for number, chosen, rejected in answers(data.rows(4, 0, 49)))


def test_the_cache_of_pairs_is_used_again_and_apart_from_conversations(tmp_path, tokenizer):
    records = [{"conversations": chat("q"), "chosen": "good", "rejected": "bad", "messages": chat("q", "a")}]
    path = write_jsonl(tmp_path / "d.jsonl", records)
    first = answers(DPOData(path, tokenizer, 64).rows(0, 0, 1))
    (built,) = caches(path)
    stamp = (built / "tokens.bin").stat().st_mtime_ns
    assert answers(DPOData(path, tokenizer, 64, seed=1).rows(0, 0, 1)) == first
    assert caches(path) == [built] and (built / "tokens.bin").stat().st_mtime_ns == stamp
    DPOData(path, tokenizer, 65)
    assert len(caches(path)) == 2
    with pytest.raises(ValueError, match="nothing to train on"):  # a conversation without an answer
        SFTData(path, tokenizer, 64)
    with pytest.raises(ValueError, match=r"none\.json does not exist.*data_process\.py dpo"):
        DPOData(tmp_path / "none.json", tokenizer, 64)


def test_real_pairs(tmp_path, shared_data):
    tokenizer = Tokenizer((shared_data / "minimind_v1_tokenizer/tokenizer.json").read_text("utf-8"))
    path = tmp_path / "d.json"
    path.write_bytes((shared_data / "dpo/dpo_zh.json").read_bytes())
    data = DPOData(path, tokenizer, 512)
    unused = sum(data.stats["not used"].values())
    assert data.num_rows + unused == 300 and data.num_rows > 150 and data.stats["pairs cut"] > 0
    batch = data.rows(0, 0, data.num_rows)
    assert sorted(batch.pairs.tolist()) == list(range(data.num_rows)) and batch.num_targets == data.num_tokens
    assert batch.input_ids.shape[1] == 512 and all(chosen != rejected for _, chosen, rejected in answers(batch))


# ---------------------------------------------------------------------------------------------- MixedData


def sft(tmp_path: Path, tokenizer, name: str, n: int, max_seq_len: int = 48, **options) -> SFTData:
    """n conversations about `name`, each a row of its own."""
    records = [{"conversations": chat(f"{name}{i:03}", f"answer {name}{i:03}")} for i in range(n)]
    data = SFTData(write_jsonl(tmp_path / f"{name}.jsonl", records), tokenizer, max_seq_len, **options)
    assert data.num_rows == n
    return data


def mixed(tmp_path: Path, tokenizer, n: int, replay: int, share: float, **options) -> MixedData:
    return MixedData(
        sft(tmp_path, tokenizer, "new", n, **options), sft(tmp_path, tokenizer, "old", replay, **options), share
    )


def names(tokenizer, batch) -> list[str]:
    """The name in the answer of every row, "" for padding."""
    texts = [tokenizer.decode(labels[labels != IGNORE]) for labels in batch.labels]
    return [text.removeprefix("answer ") for text in texts]


@pytest.mark.parametrize(
    ("n", "share", "replayed"), [(30, 0.25, 10), (30, 0.5, 30), (31, 0.1, 3), (10, 0.01, 1), (5, 0.8, 20)]
)
def test_an_epoch_has_all_new_rows_and_the_share_of_old_ones(tmp_path, tokenizer, n, share, replayed):
    data = mixed(tmp_path, tokenizer, n, 90, share)  # three epochs are one pass over the old rows at most
    assert data.num_rows == n + replayed
    for epoch in range(3):
        found = names(tokenizer, data.rows(epoch, 0, data.num_rows))
        new, old = (sorted(name for name in found if name.startswith(kind)) for kind in ("new", "old"))
        assert new == [f"new{i:03}" for i in range(n)] and len(set(old)) == len(old) == replayed


def test_rows_are_those_of_the_two_files_bit_for_bit(tmp_path, tokenizer):
    data = mixed(tmp_path, tokenizer, 6, 4, 0.4)
    assert data.num_rows == 10  # all of both
    rows = [Counter(json.dumps([x.tolist() for x in row]) for row in zip(*part.rows(0, 0, part.num_rows), strict=True))
            for part in (data, data.data, data.replay)]  # fmt: skip
    assert rows[0] == rows[1] + rows[2]
    assert [x.dtype for x in data.rows(0, 0, 3)] == [torch.int64, torch.int64, torch.int32]


def test_old_rows_are_mixed_among_the_new(tmp_path, tokenizer):
    data = mixed(tmp_path, tokenizer, 100, 100, 0.5)
    kinds = [name[:3] for name in names(tokenizer, data.rows(0, 0, 200))]
    assert all(30 < kinds[start : start + 100].count("old") < 70 for start in (0, 50, 100))


def test_replay_goes_through_everything_over_the_epochs(tmp_path, tokenizer):
    data = mixed(tmp_path, tokenizer, 21, 20, 0.25)  # 7 replayed an epoch: 20 epochs are 7 passes
    epochs = [[name for name in names(tokenizer, data.rows(epoch, 0, 28)) if name[:3] == "old"] for epoch in range(20)]
    assert all(len(found) == 7 for found in epochs)
    assert len({name for found in epochs[:2] for name in found}) == 14  # another part
    assert len({name for found in epochs[:3] for name in found}) == 20  # 20 of these 21 are the first pass
    counts = Counter(name for found in epochs for name in found)
    assert len(counts) == 20 and set(counts.values()) == {7}


def test_every_pass_over_replay_has_its_own_shuffled_order(tmp_path, tokenizer):
    data = mixed(tmp_path, tokenizer, 21, 14, 0.25)  # 7 replayed an epoch: 2 epochs are a pass
    parts = [{name for name in names(tokenizer, data.rows(epoch, 0, 28)) if name[:3] == "old"} for epoch in range(4)]
    assert parts[0] | parts[1] == parts[2] | parts[3] and parts[0] not in parts[2:]
    assert parts[0] == set(names(tokenizer, data.replay.rows(0, 0, 7)))
    assert parts[3] == set(names(tokenizer, data.replay.rows(1, 7, 14)))


def test_a_small_replay_is_taken_several_times_an_epoch(tmp_path, tokenizer):
    data = mixed(tmp_path, tokenizer, 30, 4, 0.25)
    counts = Counter(name for name in names(tokenizer, data.rows(0, 0, 40)) if name[:3] == "old")
    assert sorted(counts.values()) == [2, 2, 3, 3]


def test_the_mix_is_the_same_by_seed_and_another_each_epoch(tmp_path, tokenizer):
    data = mixed(tmp_path, tokenizer, 30, 20, 0.25)
    whole = {epoch: data.rows(epoch, 0, 43) for epoch in (0, 1, 2)}
    orders = [names(tokenizer, batch) for batch in whole.values()]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert [n for n in orders[0] if n[:3] == "new"] != [n for n in orders[1] if n[:3] == "new"]
    again = mixed(tmp_path, tokenizer, 30, 20, 0.25)
    for step in (1, 4, 7):  # epochs in turn, as a resumed run or two ranks may ask
        for start in range(0, 43, step):
            for epoch in (2, 0, 1):
                stop = min(start + step, 43)
                for part, all_rows in zip(again.rows(epoch, start, stop), whole[epoch], strict=True):
                    assert torch.equal(part, all_rows[start:stop])
    other = mixed(tmp_path, tokenizer, 30, 20, 0.25, seed=7)
    assert names(tokenizer, other.rows(0, 0, 43)) != orders[0]


def test_past_the_end_of_a_mix_is_padding(tmp_path, tokenizer):
    data = mixed(tmp_path, tokenizer, 6, 4, 0.4)
    batch = data.rows(0, 8, 13)
    assert all(names(tokenizer, batch)[:2]) and not batch.input_ids[2:].any() and not batch.documents[2:].any()
    assert (batch.labels[2:] == IGNORE).all()
    assert data.rows(0, 20, 22).num_tokens == 0 and data.rows(0, 20, 22).input_ids.shape == (2, 48)


def test_the_figures_of_a_mix(tmp_path, tokenizer):
    data = mixed(tmp_path, tokenizer, 30, 20, 0.25)
    targets = [data.rows(epoch, 0, 40).num_targets for epoch in range(2)]
    assert data.num_tokens == sum(targets) / 2 and data.stats["target_tokens"] == data.num_tokens
    assert data.num_bytes == 40 * len("answer new000") == data.stats["target_bytes"]
    assert (data.stats["rows"], data.stats["share"], data.stats["replay"]["rows"]) == (40, 0.25, 20)
    assert (data.seed, data.max_seq_len) == (1337, 48)
    json.dumps(data.stats)

    new, old = data.data, data.replay
    assert data.fingerprint == MixedData(new, old, 0.25).fingerprint
    others = [MixedData(new, old, 0.3), MixedData(old, old, 0.25), MixedData(new, new, 0.25)]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 4


@pytest.mark.parametrize("share", [0, 1, -0.5, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(tmp_path, tokenizer, share):
    with pytest.raises(ValueError, match="above 0 and below 1"):
        mixed(tmp_path, tokenizer, 2, 2, share)


def test_two_files_opened_differently_are_refused(tmp_path, tokenizer):
    new = sft(tmp_path, tokenizer, "new", 2)
    with pytest.raises(ValueError, match="max_seq_len 48 and 50: open both with the same"):
        MixedData(new, sft(tmp_path, tokenizer, "old", 2, max_seq_len=50), 0.5)
    with pytest.raises(ValueError, match="seed 1337 and 7: open both with the same"):
        MixedData(new, sft(tmp_path, tokenizer, "old", 2, seed=7), 0.5)


def test_packed_rows_stay_whole_in_a_mix(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "s.jsonl", [{"conversations": chat(text, text[::-1])} for text in some_texts(80, 12)])
    packed = SFTData(path, tokenizer, 160)
    batch = (data := MixedData(packed, packed, 0.2)).rows(0, 0, 1000)
    assert int(batch.documents.max()) > 2 and data.num_rows > packed.num_rows
    rows = {tuple(row) for row in packed.rows(0, 0, packed.num_rows).input_ids.tolist()}
    assert {tuple(row) for row in batch.input_ids[: data.num_rows].tolist()} == rows
