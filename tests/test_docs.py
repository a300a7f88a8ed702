"""The code in the documentation runs."""

from __future__ import annotations

import ast
import re
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo.testing import check_stage
from tests.trees import assert_close, gradients, problem, tensors, train

ROOT = Path(__file__).parents[1]


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_stages_of_the_guide_work(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = types.ModuleType("guide")
    monkeypatch.setitem(sys.modules, "guide", guide)  # its named tuples can be pickled
    names = vars(guide)
    for block in python_blocks("docs/stages.md"):
        exec(block, names)
    centralize, signs, roots, bases = (
        names[name]()  # type: ignore[operator]
        for name in ("centralize", "sign_of_average", "diagonal_roots", "signs_in_eigenbases")
    )
    start_late = names["signs_in_eigenbases"]
    check_stage(lambda: fs.chain(fs.kronecker_statistics(), start_late(2, start=6)), steps=10)
    assert signs.name == "sign_of_average"
    blocks = fs.chain(
        fs.kronecker_statistics(), fs.ema(), fs.graft(roots, onto=fs.scale_by_adam(beta1=0))
    )
    rotated = fs.blocked(fs.chain(fs.kronecker_statistics(), bases), 4)
    for tx in (fs.chain(signs), fs.chain(fs.blocked(blocks, 4), fs.scale(-0.1)), rotated):
        _, history, _ = train(tx, problem(), gradients(3), fs.apply_updates)
        assert all(torch.isfinite(u).all() for u in tensors(history))
    mine, theirs = fs.chain(fs.scale(3.0), fs.scale_by_rms(0.5)), names["of_updates"]
    within = fs.blocked(fs.chain(fs.scale(3.0), theirs(fs.scale_by_rms(0.5))), 4)  # type: ignore[operator]
    (_, outside, _), (_, inside, _) = (
        train(tx, problem(), gradients(3), fs.apply_updates) for tx in (mine, within)
    )
    assert_close(inside, outside, 1e-6)
    rows, _ = centralize.update({"w": torch.randn(3, 4)}, ())
    assert torch.allclose(rows["w"].sum(-1), torch.zeros(3), atol=1e-6)
    g, next_g = (torch.randn(4, 4, dtype=torch.float64) for _ in range(2))
    _, state = rotated.update({"w": g}, rotated.init({"w": g}))
    turned, _ = rotated.update({"w": next_g}, state)  # in the bases of the first step
    left, right = torch.linalg.eigh(g @ g.T)[1], torch.linalg.eigh(g.T @ g)[1]
    assert torch.allclose(turned["w"], left @ (left.T @ next_g @ right).sign() @ right.T)


@pytest.mark.parametrize("i", range(len(python_blocks("README.md"))))  # a graph of a refresh, too
def test_the_examples_of_the_readme_run(
    i: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some save a file
    torch._dynamo.reset()  # other tests' graphs of the same code count towards its limit
    exec(python_blocks("README.md")[i], {})


def test_the_chain_of_the_readme_changes_nothing_on_a_gradient_that_is_not_finite() -> None:
    (block,) = (b for b in python_blocks("README.md") if "tx = chain(" in b)
    names: dict[str, Any] = {}
    exec(block, names)
    tx = names["tx"]
    params = {"w": torch.ones(4, 3), "b": torch.ones(3)}
    good = {"w": torch.ones(4, 3), "b": torch.ones(3)}
    updates, state = tx.update(good, tx.init(params), params)
    assert all(x.any() for x in tensors(updates))
    updates, _ = tx.update({**good, "b": good["b"] * float("nan")}, state, params)
    assert not any(x.any() for x in tensors(updates))


def test_the_table_of_the_readme_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = (b for b in python_blocks("README.md") if "routing_table" in b)
    exec(block, {})
    printed = [f"    {line}".rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "\n".join(printed) in (ROOT / "README.md").read_text()


def test_links_of_the_documentation_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def rows_of(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(count, 4, generator=generator)
    return [(x, x[:2] - 1) for x in xs]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the trainers, on their own account
def test_the_clients_of_the_guide_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block is run, and what it defines is used for a short training."""
    for name in ("transformers", "accelerate", "lightning"):
        pytest.importorskip(name, reason="needs the extra: pip install 'funshampoo[integrations]'")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "clients"}
    for block in python_blocks("docs/clients.md"):
        exec(block, names)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner = torch.nn.Linear(4, 2)

        def forward(self, x: torch.Tensor, labels: Any = None) -> Any:
            loss = None if labels is None else (self.inner(x) - labels).square().mean()
            return self.inner(x) if labels is None else {"loss": loss}

    def distance(model: torch.nn.Module) -> float:
        start = Model().inner.weight
        return float((dict(model.named_parameters())["inner.weight"] - start).abs().max())

    rows = [{"x": x, "labels": y} for x, y in rows_of(16)]
    first = names["trainer"](Model(), rows, "first")
    first.add_callback(names["Consolidate"])
    first.train()
    assert distance(first.model) > 0
    adamw = torch.optim.AdamW, {"lr": 1e-3}
    old = names["trainer"](Model(), rows, "old")
    old.optimizer_cls_and_kwargs = adamw
    old.train()
    new = names["switched"](Model(), rows, "new", "old/checkpoint-10")
    assert isinstance(new.optimizer.optimizer, fs.Shampoo)

    loader = torch.utils.data.DataLoader(rows_of(16), batch_size=4)  # type: ignore[arg-type]
    accelerator, model, optimizer, batches = names["prepared"](Model(), loader)
    for x, y in batches:
        accelerator.backward((model(x) - y).square().mean())
        optimizer.step()
    assert distance(model) > 0

    module = names["Module"](Model())
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    names["lightning"].Trainer(accelerator="cpu", max_epochs=1, **quiet).fit(module, loader)
    assert distance(module.model) > 0

    plain = optimizer.optimizer
    names["save"](model, plain, "folder")
    other_model = Model()
    other = fs.Shampoo(other_model.named_parameters(), lr=0.5)
    names["load"](other_model, other, "folder")
    assert other.param_groups[0]["lr"] == 1e-3
    for p, q in zip(model.parameters(), other_model.parameters()):
        assert plain.state[p].keys() == other.state[q].keys()
        assert all(torch.equal(x, other.state[q][name]) for name, x in plain.state[p].items())


def test_the_index_has_every_public_name() -> None:
    names = runpy.run_path(str(ROOT / "docs" / "api.py"))
    text: str = names["page"]()
    assert (ROOT / "docs" / "api.md").read_text() == text, "run: python docs/api.py"
    modules = [module for module, _ in names["MODULES"].values()]
    for name in [*names["own_names"](), *(n for m in modules for n in names_with_docstrings(m))]:
        assert f"| [{name}](" in text, name
    assert not re.search(r"\| *\|$", text, re.MULTILINE)  # each says what it is


def names_with_docstrings(module: types.ModuleType) -> list[str]:
    return [n for n in module.__all__ if isinstance(getattr(module, n), type | types.FunctionType)]


ITEM = re.compile(r"    [\w*][\w*, .()\[\]]*: ")
TWO_ITEMS = re.compile(r"[.;] [a-z_]+(, [a-z_]+)*: ")


def items(text: str) -> list[tuple[str, str]]:
    """(section, line) of the lines of a docstring that begin an item."""
    section, found = "", []
    for line in text.splitlines():
        if line and not line.startswith(" "):
            section = line
        elif section in ("Args:", "Attributes:", "Raises:") and line[4:5].strip():
            found.append((section, line))
    return found


def test_every_argument_has_an_item_of_its_own() -> None:
    wrong = []
    for path in sorted((ROOT / "funshampoo").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                for section, line in items(ast.get_docstring(node) or ""):
                    two = section == "Args:" and TWO_ITEMS.search(line)
                    if two or not ITEM.match(line):
                        wrong.append(f"{path.name}, {node.name}: {line.strip()}")
    assert wrong == []
