"""The page of a plan: what it shows, and that it is a page."""

from __future__ import annotations

import dataclasses
import re
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import keras
import models
import pytest
from keras import layers
from parity import layout_map

import keras_tp
from keras_tp import pages
from keras_tp.blocks import Tree, is_shown
from keras_tp.pages import plan_page, write_whole
from keras_tp.plans import Plan

EMPTY = {"meta", "link", "br"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell", "chrome")


class Page(HTMLParser):
    """Reads a page strictly: what is opened is closed, and nothing comes from elsewhere."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.problems: list[str] = []
        self.words = ""
        self.feed(page)
        self.close()
        self.problems += [f"<{tag}> is not closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in EMPTY:
            self.open.append(tag)
        known = dict(attrs)
        for name in (tag, *(known.get("class") or "").split()):
            self.count[name] = self.count.get(name, 0) + 1
        if tag in ("script", "img", "iframe", "object", "base", "form"):
            self.problems.append(f"there is a <{tag}>")
        for name, value in attrs:
            if name.startswith("on"):
                self.problems.append(f"<{tag} {name}>")
            if name in ("src", "href") and not (value or "").startswith(("#", "data:")):
                self.problems.append(f"<{tag}> is of {value}")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            if "url(" in data or "@import" in data:
                self.problems.append("the style is of elsewhere")
        else:
            self.words += data + " "

    def number(self, name: str) -> int:
        return self.count.get(name, 0)


def read(page: str) -> Page:
    found = Page(page)
    assert found.problems == []
    return found


def plan_of(model: Any, layout: dict[Any, Any], /, **sizes: int) -> Plan:
    return keras_tp.plan(model, layout_map(layout, sizes or {"batch": 2, "model": 2}))


def transformer_plan(**sizes: int) -> Plan:
    return plan_of(models.transformer(), models.TRANSFORMER_LAYOUT, **sizes)


def test_the_page_shows_what_was_decided() -> None:
    """A page that leaves out a weight, a shape or a reason is a nice picture of another plan."""
    layout = {"sequential/dense/kernel": ("batch", "model"), ".*dense_1/kernel": ("model", None)}
    plan = plan_of(models.dense_stack(), layout)
    page = read(plan_page(plan))
    for layer in filter(is_shown, plan.layers):
        assert page.words.count(layer.path) >= 1
        assert layer.reason in page.words
        for collective in (*layer.forward, *layer.backward):
            assert f"{collective} \u00b7 {collective.axis}" in page.words
    for v in plan.variables:
        assert f"{v.shape}" in page.words
        assert f"{v.local_shape(0)}" in page.words
        assert v.pattern is None or v.pattern in page.words
    for note in plan.notes:
        assert note in page.words
    assert page.number("layer") == 4  # none of these is like another
    assert "On  4 ranks  (batch=2, model=2) the fullest one stores" in page.words
    colors = re.findall(r'class="layer (s-\w+)"', plan_page(plan))
    assert colors == ["s-column", "s-row", "s-replicated", "s-replicated"]


class Named(layers.Layer):
    """A layer with whatever name: Keras forbids only the slash."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        self.inner = layers.Dense(4, name=f"{name}\0")

    def build(self, shape: Any) -> None:
        self.inner.build(shape)

    def call(self, x: Any) -> Any:
        return self.inner(x)


def test_names_and_patterns_are_no_markup() -> None:
    """A path that is markup hides what comes behind it, or runs."""
    name = "<script>alert(1)<script>&amp;\"'><img src=x onerror=alert(2)>"
    model = keras.Sequential([keras.Input((4,)), Named(name)], name="<b>")
    pattern = ".*(kernel|<svg onload='alert(3)'>|\"&lt;)"
    plan = plan_of(model, {pattern: (None, "model")})
    page = read(plan_page(plan))
    assert name in page.words
    assert pattern in page.words
    assert f"{name}\ufffd" in page.words


def blocks(*widths: int) -> Any:
    inputs = x = keras.Input((4,))
    for i, width in enumerate(widths):
        h = layers.Dense(width, name=f"up_{i}")(layers.LayerNormalization(name=f"norm_{i}")(x))
        x = x + layers.Dense(4, name=f"down_{i}")(h)
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def test_equal_blocks_are_folded_and_others_are_not() -> None:
    """Eighty drawings of one block hide the one that differs; so does a fold that takes it in."""
    layout = {r"up_\d/kernel": (None, "model"), r"down_\d/kernel": ("model", None)}
    equal = plan_of(blocks(8, 8, 8, 8), layout)
    page = read(plan_page(equal))
    assert page.number("layer") == 3 + 1
    assert "\u00d7 4" in page.words
    for name in ("norm_0", "down_1", "up_3", "head"):
        assert name in page.words, "each path is there to be searched"
    other_shape = read(plan_page(plan_of(blocks(8, 8, 6, 8), layout)))
    assert other_shape.number("layer") == 3 + 3 + 3 + 1
    assert "(4, 6)" in other_shape.words
    other_layout = {r"up_[013]/kernel": (None, "model"), r"up_2/kernel": ("model", None)}
    plan = plan_of(blocks(8, 8, 8, 8), other_layout)
    assert read(plan_page(plan)).number("layer") == 3 + 3 + 3 + 1
    tree = Tree(equal)
    paths = [path for run in tree.runs(tree.top) for path in run.again]
    paths += [block.path for run in tree.runs(tree.top) for block in run.blocks]
    assert sorted(paths) == sorted(layer.path for layer in equal.layers if is_shown(layer))


def test_meshes_are_drawn_or_said_to_be_elided() -> None:
    """A thousand squares are a grey area, and sixteen that stand for them without a word a lie."""
    small = read(plan_page(transformer_plan(pod=2, batch=2, model=3)))
    assert small.number("rank") == 12
    assert "too many to draw" not in small.words
    large = read(plan_page(transformer_plan(pod=2, batch=16, model=32)))
    assert large.number("rank") == 2 + 16 + 14
    assert "1,024 ranks are too many to draw: this is one line of each axis" in large.words
    assert "480" in large.words.split(), "the last rank of the line along batch"
    line = read(plan_page(transformer_plan(model=40)))
    assert line.number("rank") == 14


def test_ranks_that_store_alike_share_a_bar() -> None:
    """A bar for the first rank alone says nothing of those that are fuller or empty."""
    page = read(plan_page(transformer_plan(batch=2, model=3)))
    assert page.number("bar") == 1 + 2
    assert "4 ranks: 0\u20131, 3\u20134" in page.words
    assert "2 ranks: 2, 5" in page.words
    many = keras.Sequential([keras.Input((1,)), *(layers.Dense(n) for n in range(1, 40))])
    page = read(plan_page(plan_of(many, {".*bias": ("model",)}, model=64)))
    assert page.number("bar") == 8
    assert "more ranks store" in page.words


def test_a_style_that_is_new_is_named() -> None:
    """A page that knows five styles drew the sixth in no color, without a word."""
    plan = transformer_plan()
    first = next(layer for layer in plan.layers if layer.styles)
    new = dataclasses.replace(first, styles=(dataclasses.replace(first.styles[0], name="new"),))
    changed = dataclasses.replace(plan, layers=(new,))
    assert '<span class="pill s-other"><i></i>new</span>' in plan_page(changed)


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up left half a page in place of the one before."""
    plan = transformer_plan()
    path = tmp_path / "plan.html"
    plan.save(path)
    assert read(path.read_text()).number("layer") > 5
    (tmp_path / "any").touch()
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode, "others may read it, too"
    (tmp_path / "any").unlink()

    def full(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(pages.Path, "replace", full)
        with pytest.raises(OSError, match="no space"):
            write_whole(path, "half")
    assert path.read_text().startswith("<!DOCTYPE html>")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.html"]
    plan.save(f"{tmp_path}/plan.JSON")
    with pytest.raises(ValueError, match=r"as \.html or \.json, not as"):
        plan.save(tmp_path / "plan.pdf")


def test_a_browser_shows_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Markup that a parser takes and a browser does not: a blank page, a style refused.

    Without a browser on PATH the parser has the last word, which is said.
    """
    plan = transformer_plan()
    path = tmp_path / "plan.html"
    plan.save(path)
    wanted = read(path.read_text()).number("layer")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        with capsys.disabled():
            print("\ntest_pages: no Chromium on PATH, the page was read by a parser alone")
        return
    dom, said = visit(browser, path, "--dump-dom")
    assert "CONSOLE" not in said, said
    assert len(re.findall(r'class="layer ', dom)) == wanted
    picture = tmp_path / "plan.png"
    _, said = visit(browser, path, f"--screenshot={picture}", "--window-size=800,600")
    assert len(set(pixels(picture))) > 50, "a page of one color is blank"
    # That it would be seen: a page with what the policy forbids.
    wrong = tmp_path / "wrong.html"
    wrong.write_text(path.read_text().replace("<header>", "<script>alert(1)</script><header>"))
    assert "CONSOLE" in visit(browser, wrong, "--dump-dom")[1]


def visit(browser: str, path: Path, *options: str) -> tuple[str, str]:
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--enable-logging=stderr", "--no-first-run", f"--user-data-dir={path.parent}/home"]
    command += [*options, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def pixels(path: Path) -> set[bytes]:
    """The different lines of a picture, as they stand in the file."""
    data, packed, at = path.read_bytes(), b"", 8
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        if kind == b"IHDR":
            width, height = struct.unpack(">II", data[at + 8 : at + 16])
        if kind == b"IDAT":
            packed += data[at + 8 : at + 8 + length]
        at += 12 + length
    raw = zlib.decompress(packed)
    line = len(raw) // height
    assert line > width
    return {raw[i * line + 1 : (i + 1) * line] for i in range(height)}
