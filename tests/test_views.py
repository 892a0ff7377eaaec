"""Views of how a canvas filled: its history, the page, the animation, and that no text in them can do anything."""

import json
import re
import time
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from browser import browser_page, evaluator
from hypothesis import given
from hypothesis import strategies as st
from toys import tiny_model
from world import ROOT

from data.lib.escape import inert
from data.lib.history import HOLE, History, frame_after, tokens_of
from data.lib.layout import columns, lines_of
from data.lib.tokenizer import BPETokenizer, ByteTokenizer, WordPieceTokenizer
from data.lib.views import save_histories
from sample import denoise

BYTES = ByteTokenizer()
NASTY = "\x1b]0;owned\x07\x1b[2J</script><script>document.title='owned'</script>&amp;\x9b31m\u202e\x00"
WORDPIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##c", "##d", "<", "##"]
TOKENIZERS = [
    BYTES,
    BPETokenizer([*(chr(i) for i in range(256)), "Ã©", "ab", "\xe6\x97"], r"\s+|\S+"),
    BPETokenizer([chr(i) for i in range(256)], r"\s+|\S+", None, {"<s>": 256, "</s>": 257, "<mask>": 258}),
    WordPieceTokenizer(WORDPIECES, True, True, True),
    WordPieceTokenizer(["<mask>", "<unk>", *"ACDE"], False, False, True),
]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: type(tokenizer).__name__)
@given(data=st.data())
def test_pieces_join_to_the_text(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    pieces = tokenizer.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if not isinstance(tokenizer, WordPieceTokenizer) and not set(ids) & set(tokenizer.special_ids):
        whole = b"".join(tokenizer.bytes_of[i] for i in ids)
        assert tokenizer.decode(ids) == whole.decode("utf-8", errors="replace")


def test_a_character_of_several_tokens_appears_with_its_last():
    assert BYTES.pieces(list("aé日".encode())) == ["a", "", "é", "", "", "日"]
    assert BYTES.pieces([0xC3, 256, 0xA9]) == ["\ufffd", "<mask>", "\ufffd"]
    assert tokens_of(BYTES, [97, 256, 10]) == ["a", HOLE, "\n"]


@given(st.text())
def test_inert_text_does_nothing(text):
    shown = inert(text)
    assert len(shown) == len(text)
    assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    assert inert("é日\t\n👩‍💻") == "é日\t\n👩‍💻"


@given(st.lists(st.text("ab\t\n日é\u0301 "), max_size=40), st.integers(2, 12))
def test_lines_keep_to_the_width(tokens, width):
    lines = lines_of(tokens, [str(i) for i in range(len(tokens))], width, 10**6)
    for line in lines:
        assert sum(columns(c) for text, _ in line for c in text) <= width
    shown = "".join(text for line in lines for text, _ in line)
    assert shown.replace(" ", "") == re.sub(r"[\s]", "", "".join(tokens))


@pytest.mark.parametrize("kind", ["new", "draft"])
def test_the_lines_shown_are_around_the_newest_token(kind):
    kinds = [""] * 50 + [kind] + ["hole"] * 49
    assert lines_of("ab" * 50, kinds, 2, 5)[2] == [("a", kind), ("b", "hole")]


def run_of(start, steps=8, order="random", **flags):
    """The History of a denoising run of a random model, and its canvases, each with its probabilities."""
    model = tiny_model(V=256, T=len(start))
    log_p = torch.zeros(1, len(start))
    run, canvases = History(BYTES, start), [(start, [1.0] * len(start))]
    for canvas in denoise(model, torch.tensor([start]), steps, order, log_p=log_p, **flags):
        canvases.append((canvas[0].tolist(), log_p[0].exp().tolist()))
        run.add(*canvases[-1], seconds=0.0)
    return run, canvases


@pytest.mark.parametrize("order", ["random", "confidence", "remask"])
def test_history_replays_the_canvases(order):
    """What is shown, and which tokens each step has set: in remask all that stand, redrawn or not."""
    run, canvases = run_of([*"é".encode(), *[256] * 40], order=order)
    assert run.holes == [False, False, *[True] * 40]
    for k, ((tokens, kinds), (canvas, probability)) in enumerate(zip(run.frames(), canvases)):
        assert tokens == tokens_of(BYTES, canvas)
        assert [kind == "hole" for kind in kinds] == [i == 256 for i in canvas]
        before = canvases[k - 1][0] if k else canvas
        for i in range(2, 42):
            if kinds[i] == "new":
                p = next(p for position, _, p in run.steps[k - 1] if position == i)
                assert abs(p - probability[i]) < 1e-3
            else:
                assert canvas[i] in (256, before[i])
        assert kinds[:2] == ["given", "given"]
        assert order != "remask" or kinds.count("") == 0
    assert run.kinds == kinds


def test_a_draft_becomes_certain_is_replaced_or_becomes_a_hole_again():
    run = History(BYTES, [*b">", *[256] * 4])
    run.add([*b">abcd"], [1.0] * 5, 0.1, [False, True, True, True, True])
    run.add([*b">ax", 256, *b"d"], [1.0, 1.0, 0.25, 1.0, 1.0], 0.2, [False, False, False, False, True])
    run.add([*b">axyd"], [1.0, 1.0, 0.25, 0.5, 0.75], 0.3)
    assert run.steps[0] == [[i, token, "draft"] for i, token in enumerate("abcd", 1)]
    assert run.steps[1] == [[1, "a", 1.0], [2, "x", 0.25], [3, None, None]]  # the last draft waits
    assert run.steps[2] == [[3, "y", 0.5], [4, "d", 0.75]]
    assert [kinds for _, kinds in run.frames()] == [
        ["given", "hole", "hole", "hole", "hole"],
        ["given", "draft", "draft", "draft", "draft"],
        ["given", "new", "new", "hole", "draft"],
        ["given", "", "", "new", "new"],
    ]


@given(st.lists(st.lists(st.tuples(st.sampled_from([*"aé".encode(), 256]), st.booleans()), min_size=4, max_size=4)))
def test_the_steps_in_the_page_reproduce_every_frame(canvases):
    """Also where a draft ends a character of several tokens, or a token becomes a draft again."""
    run, frames = History(BYTES, [256] * 4), []
    for canvas in canvases:
        ids, is_draft = zip(*((i, is_draft and i != 256) for i, is_draft in canvas))
        run.add(ids, [0.5] * 4, 0.0, is_draft)
        frames.append((run.tokens, run.kinds))
        assert run.tokens == tokens_of(BYTES, ids)
        assert [kind == "draft" for kind in run.kinds] == [*is_draft]
        assert [kind == "hole" for kind in run.kinds] == [i == 256 for i in ids]
    frame, replayed = next(run.frames()), []
    for changes in json.loads(json.dumps(run.steps)):
        replayed.append(frame := frame_after(frame, changes))
    assert replayed == frames


def append_and_draft(text, K=3):
    """The Histories of a text appended letter by letter, and with K drafts per pass, of which the last is wrong."""
    n = len(text)
    append, draft = History(BYTES, [256] * n, "append.pt"), History(BYTES, [256] * n, "draft.pt")
    for end in range(1, n + 1):
        append.add([*text[:end], *[256] * (n - end)], [0.5] * end + [1.0] * (n - end), 0.1 * end - 0.05)
    for step, end in enumerate(range(1, n + 1, K), 1):
        canvas = [*text[: end + K - 1], *b"?", *[256] * n][:n] if end < n else [*text]
        is_draft = [end <= i < end + K for i in range(n)]
        draft.add(canvas, [0.5] * end + [1.0] * (n - end), 0.125 * step, is_draft)
    return append, draft


def data_of(page):
    return re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]


def test_the_page_is_small_and_alone(tmp_path):
    """256 positions, 64 steps, all of them written anew at each: under 500 KB, and nothing from elsewhere."""
    save_histories(tmp_path / "run.html", [[run_of([256] * 256, 64, "remask")[0]]])
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert (tmp_path / "run.html").stat().st_size < 500_000
    assert not re.search(r"https?:|src=|href=|@import|url\(", page)


def test_text_in_the_page_is_inert(tmp_path):
    save_histories(tmp_path / "run.html", [[run_of([*NASTY.encode(), 256])[0]]])
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    template = (ROOT / "data" / "lib" / "page.html").read_text(encoding="utf-8")
    assert page.count("<") == template.count("<")
    assert "\x1b" not in page
    ((run,),) = json.loads(data_of(page))["texts"]
    assert "".join(run["start"][:-1]) == inert(NASTY)


def test_the_picture_is_xml_and_ends_with_the_text(tmp_path):
    run, canvases = run_of([*NASTY.encode(), *b"\n\t<&", *[256] * 300], 64)
    save_histories(tmp_path / "run.svg", [[run]])
    root = ElementTree.parse(tmp_path / "run.svg").getroot()
    groups = root.findall("{*}g")
    assert len(groups) == 40
    assert not root.findall(".//{*}script")
    lines = ["".join(text.itertext()) for text in groups[-1].findall("{*}text")]
    assert lines[0] == "step 64 of 64"
    tokens, kinds = list(run.frames())[-1]
    expected = lines_of(tokens, kinds, 72, 32)
    assert lines[1:] == ["".join(text for text, _ in line) for line in expected]
    assert "".join(tokens) == inert(BYTES.decode(canvases[-1][0]))
    assert (tmp_path / "run.svg").stat().st_size < 1_000_000


def test_a_picture_of_two_models_has_two_panels(tmp_path):
    (quick, _), (slow, _) = run_of([256] * 30), run_of([256] * 30, 30, "left")
    quick.seconds, slow.seconds = [0.1 * k for k in range(1, 9)], [0.2 * k for k in range(1, 31)]
    quick.name, slow.name = "set.pt", "append.pt"
    save_histories(tmp_path / "run.svg", [[quick, slow]])
    groups = ElementTree.parse(tmp_path / "run.svg").getroot().findall("{*}g")
    titles = [[text.text for text in group.findall("{*}text") if text.get("class") == "step"] for group in groups]
    assert titles[0] == ["set.pt: step 0 of 8, 0.00 s", "append.pt: step 0 of 30, 0.00 s"]
    assert titles[10] == ["set.pt: step 8 of 8, 0.80 s", "append.pt: step 10 of 30, 2.00 s"]
    assert titles[-1] == ["set.pt: step 8 of 8, 0.80 s", "append.pt: step 30 of 30, 6.00 s"]


def test_a_picture_of_append_and_draft_plays_each_at_its_speed(tmp_path):
    """28 letters in 28 passes and in 10, a third of them; whichever is done stays as it is."""
    text = "What is drafted is verified."
    save_histories(tmp_path / "run.svg", [append_and_draft(text.encode())])
    frames, drafts = [], []  # the lines of each: a title and a text by append, a title and a text with drafts
    for group in ElementTree.parse(tmp_path / "run.svg").getroot().findall("{*}g"):
        frames.append(["".join(line.itertext()) for line in group])
        drafts.append([span.text for span in group.iterfind(".//{*}tspan[@class='draft']")])
    assert frames[0] == ["append.pt: step 0 of 28, 0.00 s", HOLE * 28, "draft.pt: step 0 of 10, 0.00 s", HOLE * 28]
    assert frames[4][:2] == ["append.pt: step 4 of 28, 0.35 s", "What" + HOLE * 24]
    assert frames[4][2:] == ["draft.pt: step 3 of 10, 0.38 s", "What is d?" + HOLE * 18]
    assert drafts[4] == [" d?"]
    done = ["draft.pt: step 10 of 10, 1.25 s", text]
    assert [frame[2:] == done for frame in frames] == [False] * 13 + [True] * 16
    assert frames[-1] == ["append.pt: step 28 of 28, 2.75 s", text, *done]


def test_the_page_in_a_browser(tmp_path):
    """The slider and the keys show every canvas; play runs to the end; hover says step and probability."""
    runs = [run_of([*b"def <b>\n", *[256] * 60], order=order) for order in ("random", "remask")]
    save_histories(tmp_path / "run.html", [[run] for run, _ in runs])
    with browser_page((tmp_path / "run.html").as_uri(), tmp_path / "profile") as call:
        evaluate = evaluator(call)

        def press(key):
            for kind in ("keyDown", "keyUp"):
                call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

        def text():
            return evaluate("document.querySelector('.canvas').textContent")

        def step():
            return int(evaluate("document.getElementById('step').value"))

        for number, (_, canvases) in enumerate(runs):
            chosen = f"select.selectedIndex = {number}; select.dispatchEvent(new Event('change'))"
            assert evaluate(f"{chosen}; slider.value + play.textContent") == "0Pause"  # it opens at the start and plays
            assert evaluate("at('form').offsetHeight") == 0  # which only the served page has
            for k in (0, 3, 8):
                evaluate(f"slider.value = {k}; slider.dispatchEvent(new Event('input'))")
                assert text() == "".join(tokens_of(BYTES, canvases[k][0]))
        press("ArrowLeft")
        assert step() == 7
        press("Home")  # which scrolls, unless the canvas or the slider has the focus
        assert step() == 7
        evaluate("document.querySelector('.canvas').focus()")
        for key, expected in (("Home", 0), ("ArrowRight", 1), ("ArrowUp", 2), ("ArrowLeft", 1), ("End", 8)):
            press(key)
            assert step() == expected
            assert text() == "".join(tokens_of(BYTES, runs[1][1][expected][0]))
            assert f"step {expected} of 8" in evaluate("slider.getAttribute('aria-valuetext')")
        evaluate("slider.focus()")
        press("ArrowLeft")
        assert step() == 7  # once, though the slider knows this key as well
        evaluate("play.click()")
        assert evaluate("play.textContent") == "Pause"
        for _ in range(100):
            if evaluate("play.textContent") == "Play":
                break
            time.sleep(0.1)
        assert step() == 8
        _, probability = runs[1][1][-1]
        title = evaluate("document.querySelector('.canvas').children[20].title")
        when, p = re.fullmatch(r"position 20, set in step (\d+) with probability ([\d.e-]+)", title).groups()
        assert int(when) == 8
        assert abs(float(p) - probability[20]) < 1e-3
        assert evaluate("document.querySelector('.canvas').children[2].title") == "given"
        assert evaluate("document.title").startswith("setitem")


def test_two_models_are_side_by_side_in_the_time_that_each_took(tmp_path):
    (quick, _), (slow, canvases) = run_of([256] * 30), run_of([256] * 30, 30, "left")
    quick.seconds, slow.seconds = [0.1 * k for k in range(1, 9)], [0.2 * k for k in range(1, 31)]
    quick.about, slow.about = "set.pt", "<append>.pt"
    save_histories(tmp_path / "run.html", [[quick, slow]])
    with browser_page((tmp_path / "run.html").as_uri(), tmp_path / "profile") as call:
        evaluate = evaluator(call)

        for place, steps in ((0, (0, 0)), (50, (8, 7)), (200, (8, 30))):  # of 6 seconds
            evaluate(f"slider.value = {place}; slider.dispatchEvent(new Event('input'))")
            captions = evaluate("[...document.querySelectorAll('figcaption')].map(e => e.textContent).join('|')")
            for caption, name, step, of in zip(captions.split("|"), ("set", "<append>"), steps, (8, 30)):
                assert caption.startswith(f"{name}.pt: step {step} of {of}, ")
            texts = evaluate("[...document.querySelectorAll('.canvas')].map(e => e.textContent).join('|')")
            assert texts.split("|")[1] == "".join(tokens_of(BYTES, canvases[steps[1]][0]))
        boxes = evaluate("[...document.querySelectorAll('.canvas')].map(e => e.getBoundingClientRect().top).join()")
        assert len(set(boxes.split(","))) == 1  # beside each other


def test_the_page_shows_drafts_in_a_browser(tmp_path):
    """Every frame is the history's, stepping forwards and back; a draft isn't counted as filled; the legend says it."""
    _, run = append_and_draft(b"What is drafted is verified.")
    save_histories(tmp_path / "run.html", [[run], [run_of([256] * 8)[0]]])
    frames = [[*map(list, frame)] for frame in run.frames()]
    with browser_page((tmp_path / "run.html").as_uri(), tmp_path / "profile") as call:
        evaluate = evaluator(call)
        evaluate("choose(0); pause()")
        for k in (*range(11), *range(9, -1, -1)):
            evaluate(f"go({k})")
            spans = "[...document.querySelector('.canvas').children]"
            assert evaluate(f"{spans}.map(e => e.textContent)") == frames[k][0]
            assert evaluate(f"{spans}.map(e => e.className)") == frames[k][1]
            n_set = max(0, min(28, 3 * k - 2))
            assert evaluate("status.textContent") == f"step {k} of 10, {100 * n_set / 28:.0f}% filled"
        evaluate("go(1)")
        assert evaluate(f"{spans}[1].title") == "position 1, a draft that isn't certain yet"
        assert evaluate("set.lastChild.textContent") == '3"?"draft'
        styles = f"{spans}.slice(0, 5).map(e => getComputedStyle(e).color + getComputedStyle(e).backgroundColor)"
        set_now, draft, _, _, hole = evaluate(styles)
        assert len({set_now, draft, hole}) == 3
        assert evaluate("getComputedStyle(at('drafts')).color") in draft
        assert evaluate("at('drafts').offsetWidth") > 0


def test_a_page_without_drafts_does_not_explain_them(tmp_path):
    save_histories(tmp_path / "run.html", [[run_of([256] * 8)[0]]])
    with browser_page((tmp_path / "run.html").as_uri(), tmp_path / "profile") as call:
        assert evaluator(call)("at('drafts').offsetWidth") == 0


def test_all_texts_are_side_by_side_if_they_are_few(tmp_path):
    """Two prompts in two orders, with no choice made; a choice shows one of the prompts."""
    runs = [[run_of([*prompt, *[256] * 30], order=order)[0] for order in ("left", "random")] for prompt in (b"a", b"b")]
    save_histories(tmp_path / "run.html", runs)
    with browser_page((tmp_path / "run.html").as_uri(), tmp_path / "profile") as call:
        evaluate = evaluator(call)

        def shown():
            return evaluate("[...document.querySelectorAll('.canvas')].map(e => e.textContent[0]).join('')")

        assert shown() == "aabb"
        evaluate("select.selectedIndex = 1; select.dispatchEvent(new Event('change'))")
        assert shown() == "bb"
