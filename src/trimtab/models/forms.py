"""Modules whose forward is one that Trimtab computes itself, recognised by their code.

Many families of transformers have the same norm and the same MLP under names of their own. What a class computes is
read from its source: names of arguments and of values in between, comments and docstrings do not count, anything else
does, so that a family that computes something else, or comes to, is not taken for one that it is not.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm over the last axis; ``epsilon`` is the name of its ε, ``rounding`` that of `rms_norm`."""

    epsilon: str
    rounding: str


@dataclass(frozen=True, slots=True)
class Gated:
    """``down(activation(gate(x)) * up(x))``: the names of its parts. Where ``gate`` is empty, ``up`` gives both."""

    gate: str
    up: str
    activation: str
    down: str


@dataclass(frozen=True, slots=True)
class Plain:
    """``down(activation(up(x)))``; where ``down`` is empty, another module follows."""

    up: str
    activation: str
    down: str


Form = Norm | Gated | Plain

_LLAMA = """
dtype = x.dtype
x = x.to(torch.float32)
variance = x.pow(2).mean(-1, keepdim=True)
x = x * torch.rsqrt(variance + self.variance_epsilon)
"""
_GEMMA = """
y = self._norm(x.float())
y = y * (1.0 + self.weight.float())
return y.type_as(x)
"""
_NORMALISED = "return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)"
_FUSED = """
both = self.gate_up_proj(x)
gate, both = both.chunk(2, dim=-1)
both = both * self.activation_fn(gate)
return self.down_proj(both)
"""
_FC = """
x = self.fc1(x)
x = self.activation_fn(x)
x = self.fc2(x)
return x
"""
_BERT = """
x = self.dense(x)
x = self.intermediate_act_fn(x)
return x
"""

_FORWARDS: tuple[tuple[str, Form], ...] = (
    (f"{_LLAMA}return self.weight * x.to(dtype)", Norm("variance_epsilon", "before")),
    (f"{_LLAMA}return (self.weight * x).to(dtype)", Norm("variance_epsilon", "after")),
    (_GEMMA, Norm("eps", "offset")),
    (
        "return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))",
        Gated("gate_proj", "up_proj", "act_fn", "down_proj"),
    ),
    (_FUSED, Gated("", "gate_up_proj", "activation_fn", "down_proj")),
    ("return self.down_proj(self.act_fn(self.up_proj(x)))", Plain("up_proj", "act_fn", "down_proj")),
    (_FC, Plain("fc1", "activation_fn", "fc2")),
    (_BERT, Plain("dense", "intermediate_act_fn", "")),
)  # fmt: skip


@cache
def form_of(kind: Any) -> Form | None:
    """What a class of modules computes, where it is known."""
    form = _known().get(_canonical(kind.forward))
    if isinstance(form, Norm) and form.rounding == "offset":
        inner = kind.__dict__.get("_norm")
        return form if inner is not None and _canonical(inner) == _normal(_NORMALISED) else None
    return form


@cache
def _known() -> dict[str, Form]:
    return {_normal(text): form for text, form in _FORWARDS}


def _canonical(function: object) -> str:
    """The code of a function of (self, x), in the form that forms are compared in; empty where there is none."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError, IndexError):
        return ""
    if not isinstance(tree, ast.FunctionDef) or len(tree.args.args) != 2:
        return ""
    further = tree.args.vararg or tree.args.kwarg or tree.args.kwonlyargs or tree.args.posonlyargs
    return "" if further else _dumped(tree.body, tree.args.args[1].arg)


def _normal(text: str) -> str:
    return _dumped(ast.parse(text).body, "x")


def _dumped(body: list[ast.stmt], argument: str) -> str:
    """Statements with local names numbered, without docstrings, and ``a = …; return a`` as ``return …``."""
    kept = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    if (
        len(kept) > 1
        and isinstance(last := kept[-1], ast.Return)
        and isinstance(last.value, ast.Name)
    ):
        before = kept[-2]
        if isinstance(before, ast.Assign) and ast.unparse(before.targets[0]) == last.value.id:
            kept[-2:] = [ast.Return(before.value)]
    made = {argument: "x"}
    for statement in kept:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                made.setdefault(node.id, f"v{len(made)}")
    for statement in kept:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                node.id = made.get(node.id, node.id)
    return "\n".join(ast.unparse(statement) for statement in kept)
