"""Every shipped gin file resolves to its committed form, so that no preset changes unseen.

To accept changes: python -m pytest tests/configuration/test_golden.py --update-golden
"""

import pathlib

import pytest

from jaxlm.configuration import ConfigError, resolve, resolved_text
from jaxlm.layers import Remat

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "gin_configs"
GOLDEN = ROOT / "tests" / "golden"
# Parts of a study's runs are nothing by themselves; tests/studies/test_shipped.py resolves them.
FILES = sorted(path.relative_to(SHIPPED) for path in SHIPPED.rglob("*.gin") if path.parent.name != "parts")

# What a file in each folder of gin_configs/ describes.
ROOTS = {
    "models": "%MODEL",
    "objectives": "%OBJECTIVE",
    "data": "%DATA",
    "vocabularies": "%VOCABULARY",
    "parallel": "@jaxlm.run.RunConfig()",
    "decoding": "@jaxlm.decoding.generation.GenerationConfig()",
    "evaluation": "@jaxlm.evaluation.suite.EvaluationConfig()",
    "runs": "@jaxlm.run.RunConfig()",
    "adaptations": "@jaxlm.run.RunConfig()",
    "studies": "@jaxlm.studies.config.StudyConfig()",
}

# What is said before the files of a folder, or before one file, that need or change another's values.
BEFORE = {
    "parallel": ("--gin_file=gin_configs/runs/quickstart.gin",),
    "evaluation": ("--gin.EVALUATION_DATA=eval",),
    "evaluation/distilled.gin": (),
    "evaluation/passkey.gin": (),
    "evaluation/t0.gin": ("--gin.EVALUATION_DATA=eval", "--gin.TEMPLATES=templates"),
    "evaluation/t0_full.gin": ("--gin.EVALUATION_DATA=eval", "--gin.TEMPLATES=templates"),
}

# What a file says that leaves values to those that include it.
OPEN = ("a value is required here; give it with", "no macro MODEL is defined")


def resolved(file: pathlib.Path) -> object | str:
    """The configuration; of a file that leaves values to those that include it, the sentence that asks for them."""
    try:
        before = BEFORE.get(str(file), BEFORE.get(file.parts[0], ()))
        return resolve(ROOTS[file.parts[0]], [*before, f"--gin_file=gin_configs/{file}"])
    except ConfigError as error:
        if not any(sentence in str(error) for sentence in OPEN):
            raise
        return f"# {error}\n"


def resolved_form(file: pathlib.Path) -> str:
    config = resolved(file)
    return config if isinstance(config, str) else resolved_text(config)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_shipped_file_resolves_to_its_golden_form(file, request, tmp_path):
    text = resolved_form(file)
    golden = GOLDEN / file
    if request.config.getoption("--update-golden"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert golden.is_file(), f"{file} has no golden form; run this test with --update-golden and commit the result"
    assert text == golden.read_text(), f"{file} resolves to something new; if meant, run this with --update-golden"


def test_resolved_forms_resolve_to_themselves(tmp_path):
    """What a run saves as its configuration starts the same run again."""
    for file in FILES:
        config = resolved(file)
        if isinstance(config, str):
            continue
        text, root = resolved_text(config), type(config)
        saved = tmp_path / "saved.gin"
        saved.write_text(text)
        again = resolve(f"@{root.__module__}.{root.__qualname__}()", [f"--gin_file={saved}"])
        assert resolved_text(again) == text, file


def test_golden_forms_belong_to_shipped_files(request):
    stale = {path.relative_to(GOLDEN) for path in GOLDEN.rglob("*.gin")} - set(FILES)
    if request.config.getoption("--update-golden"):
        for path in stale:
            (GOLDEN / path).unlink()
        stale = set()
    assert not stale, f"golden forms without a gin file: {sorted(map(str, stale))}; run this with --update-golden"


# Presets of gin_configs/parallel and the runs that they are for.
MESHES = {
    "1b_v5e_16": ("decoder_1b", (1, 16)),
    "1b_v6e_8_zero1": ("decoder_1b", (8, 1)),
    "8b_v5p_64": ("llama3_8b", (1, 64)),
    "8b_v6e_64": ("llama3_8b", (1, 64)),
    "70b_v5p_64": ("llama3_70b", (1, 64)),
    "70b_v6e_256": ("llama3_70b", (1, 256)),
}


@pytest.mark.parametrize("preset", sorted(path.stem for path in (SHIPPED / "parallel").glob("*.gin")))
def test_a_mesh_goes_with_its_run(preset, tmp_path):
    """As a second --gin_file, and as the last include of a file of one's own."""
    run, degrees = MESHES[preset]
    files = [f"gin_configs/runs/pods/{run}.gin", f"gin_configs/parallel/{preset}.gin"]
    (tmp_path / "both.gin").write_text("".join(f"include '{file}'\n" for file in files))
    for flags in ([f"--gin_file={file}" for file in files], [f"--gin_file={tmp_path}/both.gin"]):
        config = resolve(ROOTS["parallel"], flags)
        assert (config.parallel.mesh.data, config.parallel.mesh.fsdp) == degrees
        assert config.model.decoder.remat is not Remat.FULL


def test_model_and_objective_predict_as_many_tokens():
    """In either order of the files."""
    files = [f"--gin_file=gin_configs/{part}/multi_token.gin" for part in ("models/tiny", "objectives")]
    for flags, number in ((files, 4), (files[::-1], 2)):
        config = resolve(ROOTS["runs"], ["--gin_file=gin_configs/runs/quickstart.gin", *flags])
        assert config.model.future_tokens == config.objective.num_future == number


def test_one_line_chooses_who_computes_attention():
    flags = ["--gin_file=gin_configs/models/tiny/encoder_decoder.gin", "--gin.layers.AttentionConfig.backend='xla'"]
    config = resolve("%MODEL", flags)
    blocks = [config.encoder.blocks[0], config.decoder.blocks[0]]
    chosen = [blocks[0].attention, blocks[1].attention, blocks[1].cross_attention]
    assert [attention.backend for attention in chosen] == ["xla"] * 3
    with pytest.raises(ConfigError, match="AttentionConfig.backend='flash' does not exist"):
        resolve("%MODEL", [flags[0], flags[1].replace("xla", "flash")])
