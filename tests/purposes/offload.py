"""The section `offload`: how two models write a trace."""

from typing import Any

import pytest

from srlib import Offloader, engine
from srlib.decoding.policies import Always, Learned, Never, Policy, Random
from srlib.decoding.trace import Trace
from srlib.engine.transformers import TransformersEngine
from tests.cells import run_cells
from tests.purposes import Case, shows


class Watched(TransformersEngine):
    """Notes for how many traces it is asked at a time, how many it has open, and what each request was."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.most = self.open_ = self.cancelled = 0
        self.asked: list[tuple[int, int, int]] = []  # tokens to read, to write, to look at

    def submit(self, request: Any) -> Any:
        self.asked.append((len(request.feed), request.max_new, request.ask))
        return super().submit(request)

    def cancel(self, request: Any) -> None:
        self.cancelled += 1
        super().cancel(request)

    def step(self) -> list:
        self.most = max(self.most, len({id(request.sequence) for request in self.pending}))
        self.open_ = max(self.open_, self.slots - len(self._free))
        return super().step()


def wrote(case: Case, policy: Policy, n: int = 16, **settings: Any) -> tuple[list[Trace], Watched, Watched]:
    """`n` traces under the settings, and the engines that wrote them."""
    small, big = (Watched(model, case.fixture("tokenizer"), 64) for model in case.fixture("pair"))
    p = case.params({f"offload.{name}": value for name, value in settings.items()})
    writer = Offloader(small, big, policy, **p.offload.settings, seed=p.seed)
    traces = writer.run(case.fixture("prompts")[:n])
    assert not any(trace.error for trace in traces)
    return traces, small, big


@shows("offload.max_tokens")
def most_tokens_of_a_trace(case: Case) -> None:
    traces, *_ = wrote(case, Learned(), max_tokens=7)
    assert max(len(trace.ids) for trace in traces) == 7
    assert {trace.finish for trace in traces} == {"length", "eos"}


@shows("offload.span_budget")
def most_tokens_of_a_span(case: Case) -> None:
    traces, *_ = wrote(case, Learned(), span_budget=3)
    spans = [handover for trace in traces for handover in trace.handovers]
    assert max(span.tokens for span in spans) == 3 and any(span.closed_by == "budget" for span in spans)


@shows("offload.batch_size")
def most_traces_at_a_time(case: Case) -> None:
    for how in ({}, {"stream_chunk": 1}, {"overlap": True}):  # reading along and writing on ahead are asked for, too
        _, small, big = wrote(case, Learned(), 24, batch_size=4, oversubscribe=2.0, **how)
        assert small.most == 4 and 1 < big.most <= 4


@shows("offload.temperature")
def how_freely_both_draw(case: Case) -> None:
    for policy in (Never(), Always()):
        greedy, *_ = wrote(case, policy, temperature=0.0)
        drawn, *_ = wrote(case, policy, temperature=1.0)
        assert [trace.ids for trace in drawn] != [trace.ids for trace in greedy]


@shows("offload.top_p", "offload.top_k")
def how_far_down_both_draw(case: Case) -> None:
    """So few tokens are left that each is the likeliest."""
    least = {"offload.top_p": 1e-6, "offload.top_k": 1}[case.key]
    for policy in (Never(), Always(), Learned()):
        greedy, *_ = wrote(case, policy, temperature=0.0)
        drawn, *_ = wrote(case, policy, temperature=1.0, **{case.key.removeprefix("offload."): least})
        assert [trace.ids for trace in drawn] == [trace.ids for trace in greedy]


@shows("offload.control_chunk")
def tokens_between_two_looks(case: Case) -> None:
    _, small, big = wrote(case, Learned(), control_chunk=3)
    assert max(looked for *_, looked in small.asked) == max(written for _, written, _ in big.asked) == 3


@shows("offload.stream_chunk")
def reading_along(case: Case) -> None:
    traces, small, big = wrote(case, Learned(), stream_chunk=4)
    assert max(written for _, written, _ in small.asked) == 4
    assert any(not written for _, written, _ in big.asked)  # only to read
    as_asked, *_ = wrote(case, Learned())
    assert [trace.ids for trace in traces] == [trace.ids for trace in as_asked]


@shows("offload.overlap")
def writing_on_ahead(case: Case) -> None:
    """What it is asked for while the small model looks is taken back where that one closes the span."""
    traces, _, big = wrote(case, Learned(), overlap=True)
    assert big.cancelled > 0
    in_turns, *_ = wrote(case, Learned())
    assert [trace.ids for trace in traces] == [trace.ids for trace in in_turns]


@shows("offload.oversubscribe")
def traces_beyond_the_batch(case: Case) -> None:
    """They stand in for those that are with the big model, so that the small one takes fewer passes."""
    _, plain, _ = wrote(case, Random(0.1), 64, batch_size=16)
    _, fuller, _ = wrote(case, Random(0.1), 64, batch_size=16, oversubscribe=0.5)
    assert (plain.open_, fuller.open_) == (16, 24) and max(plain.most, fuller.most) <= 16
    assert fuller.counters.calls < plain.counters.calls


@shows("offload.hint")
def words_behind_a_problem(case: Case) -> None:
    small, big = (TransformersEngine(model, case.fixture("tokenizer")) for model in case.fixture("pair"))
    p = case.params({"offload.hint": "+1?"})
    (trace,) = Offloader(small, big, Learned(), **p.offload.settings).run(["37+5"])
    assert trace.prompt_ids == case.fixture("tokenizer").encode("37+5+1?")


@shows("offload.n_demo")
def problems_of_notebook_04(case: Case) -> None:
    given = iter([TransformersEngine(model, case.fixture("tokenizer")) for model in case.fixture("pair")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "load", lambda *_, **__: next(given))
        scope = {"p": case.params({"offload.n_demo": 5, "data.test": "arith"}), "folder": case.folder}
        exec("from srlib.show import figures\nfrom IPython.display import HTML", scope)
        run_cells("04_offload", scope, "engine.load(", "likeliest = ", "writer = Offloader(", "write_jsonl(")
    assert len(scope["traces"]) == 5
