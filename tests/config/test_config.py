"""Every option is found, typed, merged and checked; whatever is wrong is told at once."""

import re
from dataclasses import dataclass

import pytest
import yaml

from sparse_lora_dist.config import load as command_line
from sparse_lora_dist.config import paths as locations
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.config.sections import TRACKERS, AdapterConfig, TrainConfig
from sparse_lora_dist.config.spelling import ELSEWHERE
from sparse_lora_dist.distributed.launch import Launch
from sparse_lora_dist.errors import ConfigError
from sparse_lora_dist.methods import METHODS, MethodFactory
from sparse_lora_dist.methods.protocol.method import Method
from sparse_lora_dist.plan.plan_options import load_request

FLAGS = """
    model revision task trust_remote_code quantization double_quant base_cache precision
    attn_implementation gradient_checkpointing data eval_data text_field text_pair_field
    label_field column_names prompt_field response_field chat_template train_on packing
    sequence_length max_samples method rank alpha dropout target_modules
    modules_to_save init_adapter max_steps num_epochs stop_after micro_batch_size
    gradient_accumulation_steps learning_rate lr_schedule warmup_steps weight_decay adam_beta1
    adam_beta2 adam_eps moment_bits max_grad_norm seed
    ds_config device deterministic output_dir resume reset verify log_every eval_every eval_batches
    save_every
    async_save keep_last keep_best collective_timeout max_bad_steps time_limit signal_lead
    trackers debug
""".split()


@pytest.fixture(autouse=True)
def run_folder(tmp_path, monkeypatch):
    """A working directory with an engine file, and embedded assets that exist."""
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs/zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    for path in locations.EMBEDDED.values():
        (tmp_path / "assets" / path).mkdir(parents=True)
    monkeypatch.setattr(locations, "ASSETS", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems_of(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(list(argv))
    return caught.value.problems


def only_problem_of(*argv: str) -> str:
    (problem,) = problems_of(*argv)
    return problem


# What comes out


def test_without_arguments_everything_is_default():
    assert load_config([]) == Config()


def test_flags_are_frozen():
    """A new option costs every reader a line of help: add it here only if it must be."""
    assert list(Config().as_flat_dict()) == FLAGS


def test_command_line_wins_over_yaml_and_yaml_over_defaults(run_folder):
    (run_folder / "run.yaml").write_text("rank: 4\nalpha: 8\nlearning_rate: 3e-4\n")
    config = load_config(["--config", "run.yaml", "--rank", "2"])
    assert (config.adapter.rank, config.adapter.alpha) == (2, 8.0)
    assert config.train.learning_rate == 3e-4
    assert config.train.seed == 0


def test_config_written_and_read_is_equal(run_folder):
    config = load_config(
        ["--rank", "4", "--target_modules", "q_proj,v_proj", "--max_steps", "7", "--packing=false"]
    )
    (run_folder / "run.yaml").write_text(yaml.safe_dump(config.as_flat_dict()))
    assert load_config(["--config", "run.yaml"]) == config


@pytest.mark.parametrize(
    ("argv", "section", "name", "value"),
    [
        (["--packing"], "data", "packing", True),
        (["--packing", "false"], "data", "packing", False),
        (["--packing=no"], "data", "packing", False),
        (["--rank=8"], "adapter", "rank", 8),
        (["--rank", "8", "--rank", "9"], "adapter", "rank", 9),
        (["--max_steps", "null"], "train", "max_steps", None),
        (["--learning_rate", "1e-3"], "train", "learning_rate", 1e-3),
        (["--trackers", "tensorboard,wandb"], "run", "trackers", ("tensorboard", "wandb")),
        (["--trackers", "tensorboard, wandb"], "run", "trackers", ("tensorboard", "wandb")),
        (["--trackers", "[]"], "run", "trackers", ()),
        (["--modules_to_save", "a", "b"], "adapter", "modules_to_save", ("a", "b")),
        (["--target_modules", "q_proj"], "adapter", "target_modules", ("q_proj",)),
        (["--target_modules", "q_proj,v_proj"], "adapter", "target_modules", ("q_proj", "v_proj")),
        (["--target_modules", "[q_proj, x]"], "adapter", "target_modules", ("q_proj", "x")),
        (["--target_modules", "all-linear"], "adapter", "target_modules", "all-linear"),
        (["--target_modules", r".*\.[qv]_proj"], "adapter", "target_modules", r".*\.[qv]_proj"),
        (["--target_modules", "[qv]_proj"], "adapter", "target_modules", "[qv]_proj"),
    ],
)
def test_values_get_their_type(argv, section, name, value):
    assert getattr(getattr(load_config(argv), section), name) == value


def test_what_launchers_add_is_ignored():
    assert load_config(["--local_rank=3", "--rank", "4"]).adapter.rank == 4


# What is said


def test_help_all_lists_every_flag_and_method(capsys):
    with pytest.raises(SystemExit) as left:
        load_config(["--rank", "no number", "--help_all"])
    page = capsys.readouterr().out
    assert left.value.code == 0
    listed = re.findall(r"^  --(\w+)(?: |$)", page, re.MULTILINE)
    assert {*FLAGS, "config", "print_config", "help", "help_all"} <= {*listed}
    assert METHODS["lora"].summary in " ".join(page.split())


def test_help_is_printed_by_one_rank_only(capsys, monkeypatch):
    second = Launch(launcher="environment", rank=1, world_size=2)
    monkeypatch.setattr("sparse_lora_dist.config.load.this_launch", lambda: second)
    with pytest.raises(SystemExit):
        load_config(["--help"])
    assert capsys.readouterr().out == ""


def test_print_config_prints_the_merged_whole(run_folder, capsys):
    (run_folder / "run.yaml").write_text("alpha: 8\n")
    with pytest.raises(SystemExit) as left:
        load_config(["--config", "run.yaml", "--print_config", "--rank", "4"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert left.value.code == 0
    assert printed == Config().as_flat_dict() | {"alpha": 8.0, "rank": 4}


# What is wrong


def test_all_problems_come_at_once(run_folder):
    (run_folder / "run.yaml").write_text("ranks: 4\nalpha: much\n")
    (run_folder / "ds_configs/zero3.json").write_text('{"zero_optimization": {"stage": 2}}')
    problems = "\n".join(
        problems_of(
            *("--config", "run.yaml", "--max_step", "3", "--dropout", "1.0", "--seed"),
            *("--model", "./nowhere", "--chat_template", "nowhere.jinja", "--method", "none"),
        )
    )
    for words in (
        "run.yaml line 1: ranks is not an option; did you mean rank?",
        "run.yaml line 2: alpha must be a finite number, got 'much'",
        "--max_step is not an option; did you mean --max_steps?",
        "dropout must be in [0, 1), got 1.0",
        "--seed takes one value, got none",
        "--model ./nowhere does not exist, and is not a hub id",
        "--chat_template nowhere.jinja does not exist",
        "method must be one of lora",
        "zero_optimization.stage is 2, but it must be 3",
    ):
        assert words in problems


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("rank", "-3", "rank must be at least 1, got -3"),
        ("rank", "4.5", "--rank must be a whole number, got '4.5'"),
        ("rank", "true", "--rank must be a whole number"),
        ("alpha", "0", "alpha must be above 0"),
        ("dropout", "-0.1", "dropout must be in [0, 1)"),
        ("sequence_length", "7", "sequence_length must be at least 8"),
        ("max_samples", "0", "max_samples must be at least 1"),
        ("max_steps", "0", "max_steps must be at least 1 or null, got 0"),
        ("max_steps", "-1", "max_steps must be at least 1 or null, got -1"),
        ("num_epochs", "0", "num_epochs must be above 0"),
        ("micro_batch_size", "null", "--micro_batch_size must be a whole number, got 'null'"),
        ("learning_rate", ".inf", "--learning_rate must be a finite number, got '.inf'"),
        ("learning_rate", ".nan", "--learning_rate must be a finite number, got '.nan'"),
        ("weight_decay", "-1", "weight_decay must be at least 0"),
        ("seed", str(2**32), "seed must be at most"),
        ("packing", "maybe", "--packing must be true or false"),
        ("precision", "fp16", "--precision must be one of bf16, fp32, got 'fp16'"),
        ("quantization", "int8", "--quantization must be one of nf4, none"),
        ("train_on", "prompt", "--train_on must be one of response, all"),
        ("lr_schedule", "cosin", "--lr_schedule must be one of constant"),
        ("trackers", "neptun", "trackers must be any of aim, clearml"),
        ("target_modules", "(q", "target_modules must be names or a regular expression"),
        ("target_modules", "[]", "target_modules is empty"),
        ("log_every", "0", "log_every must be at least 1"),
        ("save_every", "-1", "save_every must be at least 0"),
        ("resume", "latest", "resume must be auto, never or an existing folder"),
        ("data", "train.jsonl", "--data train.jsonl does not exist"),
        ("data", "/nowhere", "--data /nowhere does not exist"),
        ("eval_data", "a/b/c", "--eval_data a/b/c does not exist"),
        ("init_adapter", "../nowhere", "--init_adapter ../nowhere does not exist"),
        ("revision", "main", "revision is for hub models"),
        ("ds_config", "nowhere.json", "--ds_config nowhere.json does not exist"),
        ("config", "nowhere.yaml", "--config nowhere.yaml cannot be read"),
        ("output_dir", "ds_configs/zero3.json", "output_dir must be a folder, got the file"),
        ("model_name", "x", "--model_name is not an option"),
        ("max-steps", "5", "did you mean --max_steps?"),
        ("no-packing", "", "did you mean --packing false?"),
        ("lora_r", "8", "did you mean --rank?"),
        ("per_device_train_batch_size", "8", "did you mean --micro_batch_size?"),
    ],
)
def test_one_wrong_value_is_one_problem(flag, value, words):
    assert words in only_problem_of(f"--{flag}", value)


def test_a_path_ends_without_a_line_break(tmp_path):
    """As YAML's | adds one."""
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: |\n  runs/a\n")
    assert "must be a path without line breaks" in only_problem_of("--config", str(file))


def test_an_option_that_is_given_again_is_named(capsys):
    load_config(["--rank=2", "--seed=1", "--rank", "3", "--seed", "1"])
    said = capsys.readouterr().out
    assert said == "note      --rank was given 2 times, and the last counts: '3'\n"
    load_request(["--model=assets/base", "--rank=2", "--rank=3", "--json"])
    assert capsys.readouterr() == ("", said), "what plan.py --json prints is read by programs"


@pytest.mark.parametrize(
    ("flag", "value", "kind"),
    [
        ("adalora_orthogonality", ".inf", "a finite number"),
        ("adalora_target_rank", ".nan", "a finite number or null"),
        ("sora_gate_lr_factor", "-.inf", "a finite number or null"),
        ("sora_lambdas", "0,nan", "a list of finite numbers"),
    ],
)
def test_no_option_of_a_method_is_nan_or_infinite(flag, value, kind):
    assert f"--{flag} must be {kind}, got " in only_problem_of(
        f"--{flag}", value, "--method", flag.split("_")[0]
    )


@pytest.mark.parametrize("name", ["stop_after", "warmup_steps"])
def test_nothing_lies_beyond_the_last_step(name):
    problem = only_problem_of("--max_steps", "10", f"--{name}", "11")
    assert problem == f"--{name} must be at most --max_steps (10), got 11"
    load_config(["--max_steps", "10", f"--{name}", "10"])


def test_constant_schedule_has_no_warmup():
    problem = only_problem_of("--lr_schedule", "constant", "--warmup_steps", "5")
    assert "Use --lr_schedule constant_with_warmup" in problem


def test_a_hub_id_needs_no_file():
    config = load_config(["--model", "owner/name-1.0", "--revision", "main", "--data", "set"])
    assert config.model.model == "owner/name-1.0"


def test_stray_words_are_refused():
    assert "'hello' does not belong to an option" in only_problem_of("hello")
    assert "'hello' does not belong to an option" in only_problem_of("--rank=3", "hello")
    assert "--rank takes one value, got 3 4" in only_problem_of("--rank", "3", "4")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rank: 4\nrank: 5\n", "line 2: rank is set twice"),
        ("rank: [1]\n", "line 1: rank must be a whole number, got [1]"),
        ("rank:\n", "line 1: rank must be a whole number, got None"),
        ("adapter: {rank: 4}\n", "line 1: adapter is not an option"),
        ("3: 4\n", "line 1: 3 is not an option"),
        ("- rank\n", "must hold 'name: value' lines, but holds a list"),
        ("rank: [\n", "cannot be read"),
        ("trackers: [1]\n", "trackers must be a list of names"),
        ("model: {a: 1}\n", "model must be text"),
    ],
)
def test_yaml_mistakes_name_their_line(run_folder, text, words):
    (run_folder / "run.yaml").write_text(text)
    assert words in only_problem_of("--config", "run.yaml")


@pytest.mark.parametrize("text", ["", "\n", "# nothing yet\n", "{}"])
def test_empty_yaml_is_refused(run_folder, text):
    """The run of all defaults would be another one than was meant."""
    (run_folder / "run.yaml").write_text(text)
    assert "--config run.yaml sets no option" in only_problem_of("--config", "run.yaml")


def test_embedded_assets_can_be_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(locations, "ASSETS", tmp_path / "none")
    problems = problems_of()
    assert [p.split()[0] for p in problems] == ["--model", "--data"]
    assert all("comes with the package. Install it again" in p for p in problems)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_is_told(monkeypatch, name):
    monkeypatch.setattr(command_line, "find_spec", lambda name: None)
    assert f"pip install {name}" in only_problem_of("--trackers", name)


def test_sections_check_themselves():
    with pytest.raises(ConfigError, match="rank must be at least 1"):
        AdapterConfig(rank=0)
    with pytest.raises(ConfigError) as caught:
        TrainConfig(micro_batch_size=0, learning_rate=-1.0)
    assert len(caught.value.problems) == 2


# Methods


@dataclass(frozen=True, kw_only=True)
class ToyOptions:
    """Toy"""

    toy_strength: float = 0.5
    """How much, at least 0."""

    def __post_init__(self):
        if self.toy_strength < 0:
            raise ValueError(f"toy_strength must be at least 0, got {self.toy_strength}")


@pytest.fixture
def toy(monkeypatch):
    factory = MethodFactory(
        options=ToyOptions, build=lambda options, steps: Method(name="toy"), summary="a toy"
    )
    monkeypatch.setitem(METHODS, "toy", factory)


def test_a_new_method_brings_its_options(toy, run_folder, capsys):
    config = load_config(["--method", "toy", "--toy_strength", "2"])
    assert config.method_options == ToyOptions(toy_strength=2.0)
    (run_folder / "run.yaml").write_text(yaml.safe_dump(config.as_flat_dict()))
    assert load_config(["--config", "run.yaml"]) == config
    with pytest.raises(SystemExit):
        load_config(["--help_all"])
    page = capsys.readouterr().out
    assert "Options of --method toy" in page and "How much, at least 0. [0.5]" in page


def test_an_option_of_another_method_is_refused(toy):
    problem = only_problem_of("--toy_strength", "2")
    assert "--toy_strength belongs to --method toy, but --method is lora" in problem


def test_a_method_checks_its_options(toy):
    problem = only_problem_of("--method", "toy", "--toy_strength", "-1")
    assert problem == "toy_strength must be at least 0, got -1.0"


# Where things are


def test_default_data_brings_its_held_out_part(run_folder):
    heldout = str(run_folder / "assets/gsm8k/heldout.jsonl")
    assert locations.eval_source(load_config([]).data) == heldout
    assert locations.eval_source(load_config(["--data", "owner/set"]).data) is None
    assert locations.eval_source(load_config(["--eval_data", "owner/set"]).data) == "owner/set"


def test_default_model_is_embedded(run_folder):
    assert locations.resolve_default("model", "default") == str(run_folder / "assets/base")
    assert locations.resolve_default("model", "owner/name") == "owner/name"


def test_flash_attention_and_packed_rows_need_single_rows() -> None:
    flags = ["--attn_implementation", "flash_attention_2", "--micro_batch_size", "2"]
    with pytest.raises(ConfigError, match="micro_batch_size is 2"):
        load_config(flags)
    assert load_config([*flags, "--packing", "false"]).data.packing is False
    assert load_config([*flags[:2], "--micro_batch_size", "1"]).train.micro_batch_size == 1


def test_options_of_other_programs_are_suggested_by_options_that_exist():
    assert {*ELSEWHERE.values()} <= {*FLAGS}
    assert not {*ELSEWHERE} & {*FLAGS}
