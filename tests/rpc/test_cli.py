"""The command line against a fake controller: what people read, what programs read, how it fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import dumont
from dumont.cli.main import app
from dumont.cli.waiting import describe_progress
from dumont.rpc.structs import from_struct
from tests.rpc.fake_controller import Served


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    served = Served()
    served.controller.capture_may_end.set()
    yield served
    served.stop()


class Cli:
    """Runs ``dumont`` against the fake controller, in which ``qa`` is deployed."""

    def __init__(self, served: Served) -> None:
        self.served = served

    def __call__(self, *arguments: str, input: str | None = None) -> Result:
        environment = {"DUMONT_ENDPOINT": self.served.address}
        return CliRunner().invoke(app, list(arguments), env=environment, input=input)

    def lines(self, *arguments: str) -> list[Any]:
        result = self(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in result.stdout.splitlines()]

    def document(self, *arguments: str) -> Any:
        (document,) = self.lines(*arguments)
        return document


@pytest.fixture
def cli(served: Served) -> Cli:
    served.controller.reset()
    cli = Cli(served)
    assert cli("deploy", "org/model", "--name", "qa").exit_code == 0
    return cli


def test_deploy_sends_its_options_and_shows_what_came_of_them(cli: Cli) -> None:
    result = cli(
        "deploy", "org/Other-1.5", "--ttl", "2h", "--storage", "local", "--weights", "included",
        "--idle-timeout", "30",
        "--park-timeout", "10m", "--engine", "causal_lm", "--prewarm",
    )  # fmt: skip
    assert result.exit_code == 0
    request = cli.served.controller.requests[-1]
    assert (request.deployment_id, request.deployment.engine, request.prewarm) == (
        "other-1-5", "causal_lm", True,
    )  # fmt: skip
    shown = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    assert ["deployment", "other-1-5"] in [[name, value.strip()] for name, value in shown]
    assert "local, 2h after its last use, weights included" in result.stdout


def test_deploy_sends_the_options_of_an_engine(cli: Cli) -> None:
    result = cli(
        "deploy", "org/model", "--name", "fast", "--engine", "vllm", "-o", "max_model_len=4096",
        "--engine-option", "dtype=bfloat16", "-o", 'speculative-config={"method": "ngram"}',
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    sent = cli.served.controller.requests[-1].deployment
    assert from_struct(sent.engine_options) == {
        "max_model_len": 4096, "dtype": "bfloat16", "speculative_config": {"method": "ngram"},
    }  # fmt: skip
    assert '"max_model_len": 4096' in result.stdout
    again = ("deploy", "org/model", "--name", "fast", "--engine", "vllm")
    other = cli(*again, "-o", "max_model_len=64")
    assert other.exit_code == 1
    assert "DEPLOYMENT_ENGINE_OPTIONS_DIFFER" in other.stderr


def test_deploy_refuses_a_wrong_option_before_it_sends_anything(cli: Cli) -> None:
    sent = len(cli.served.controller.requests)
    for option, said in (
        ("max_model_length=1", "did you mean max_model_len"),
        ("tensor_parallel_size=2", "one GPU"),
        ("max_model_len", "NAME=VALUE"),
    ):
        result = cli("deploy", "org/model", "--engine", "vllm", "-o", option)
        assert result.exit_code != 0
        assert said in result.stderr
    assert len(cli.served.controller.requests) == sent


def test_deploy_in_json_is_the_deployment(cli: Cli) -> None:
    document = cli.document("deploy", "org/model", "--name", "new", "--ttl", "1h", "--storage", "local")
    assert (document["name"], document["start_mode"]) == ("deployments/new", "checkpoint")
    assert document["checkpoint"] == {
        "enabled": True, "ttl": 3600.0, "storage": "local", "weights": "unspecified",
    }  # fmt: skip


def test_deploying_again_keeps_the_start_mode(cli: Cli) -> None:
    cli("deploy", "org/model", "--name", "cold", "--start-mode", "cold")
    assert (
        cli.document("deploy", "org/model", "--name", "cold", "--idle-timeout", "5s")["start_mode"] == "cold"
    )


@pytest.mark.parametrize("mode", ["warm", "cold"])
@pytest.mark.parametrize("option", [("--ttl", "5m"), ("--storage", "s3")])
def test_what_a_start_mode_would_ignore_is_refused(cli: Cli, mode: str, option: tuple[str, str]) -> None:
    result = cli("deploy", "org/model", "--name", "new", "--start-mode", mode, *option)
    assert result.exit_code == 1
    assert option[0] in result.stderr
    assert "[NO_SNAPSHOTS]" in result.stderr


def test_ls_lists_deployments(cli: Cli) -> None:
    header, row = cli("ls").stdout.splitlines()
    assert header.split()[:4] == ["DEPLOYMENT", "MODEL", "START", "STATE"]
    assert row.split() == ["qa", "org/model", "checkpoint", "active"]
    assert [info["name"] for info in cli.document("ls")] == ["deployments/qa"]


def test_generate_writes_the_answer_to_stdout_and_its_start_to_stderr(cli: Cli) -> None:
    result = cli(
        "generate", "qa", "Count", "--max-new-tokens", "3", "--seed", "7", "--stop", "a", "--stop", "b"
    )
    assert result.stdout == "one two three\n"
    assert result.stderr == "local in 0.25s: no instance; snapshots/one is local\n"
    request = cli.served.controller.requests[-1]
    assert (request.prompt, request.max_new_tokens, request.seed, list(request.stop)) == (
        "Count", 3, 7, ["a", "b"],
    )  # fmt: skip


def test_generate_in_json_is_one_object_a_line(cli: Cli) -> None:
    start, *pieces, end = cli.lines("generate", "deployments/qa", "Count")
    assert (start["start"]["tier"], start["start"]["phases"]) == (
        "local",
        [{"name": "restore", "seconds": 0.2}],
    )
    assert pieces == [{"text": "one"}, {"text": " two"}, {"text": " three"}]
    usage = {"prompt_tokens": 4, "output_tokens": 3, "cached_prompt_tokens": 0}
    assert (end["finish_reason"], end["usage"]) == ("end", usage)


def test_generate_makes_a_conversation_of_system_messages_and_prompt(cli: Cli) -> None:
    cli("generate", "qa", "And you?", "--system", "Be brief.", "--message", "Hi", "--message", "Hello.")
    messages = cli.served.controller.requests[-1].messages
    assert [(message.role, message.content) for message in messages] == [
        ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "And you?"),
    ]  # fmt: skip


def test_generate_reads_its_prompt_from_standard_input(cli: Cli) -> None:
    assert cli("generate", "qa", "-", input="Count").stdout == "one two three\n"
    assert cli.served.controller.requests[-1].prompt == "Count"


@pytest.mark.parametrize(
    "given", [(), ("-",), ("--system", "Be brief."), ("--message", "Hi", "--message", "Ho")]
)
def test_generate_reads_what_is_piped_in(cli: Cli, given: tuple[str, ...]) -> None:
    result = cli("generate", "qa", *given, input="Count\nto three\n")
    assert (result.exit_code, result.stdout) == (0, "one two three\n")
    request = cli.served.controller.requests[-1]
    last = request.messages[-1].content if request.messages else request.prompt
    assert last == "Count\nto three"


def test_a_conversation_that_is_complete_reads_nothing(cli: Cli) -> None:
    assert cli("generate", "qa", "--message", "Hi", input="more").exit_code == 0
    assert [m.content for m in cli.served.controller.requests[-1].messages] == ["Hi"]


def test_a_start_is_shown_at_a_terminal_in_words() -> None:
    waiting = dumont.StartProgress(True, "waiting", "", "", "")
    loading = dumont.StartProgress(True, "load", "instances/a", "nodes/one", "")
    restoring = dumont.StartProgress(True, "weights", "instances/a", "nodes/one", "snapshots/s")
    assert [describe_progress(step) for step in (waiting, loading, restoring)] == [
        "waiting for a place to start",
        "loading the model on one: load",
        "restoring s on one: weights",
    ]


def test_run_deploys_what_is_not_deployed_and_answers(cli: Cli) -> None:
    result = cli("run", "org/New-Model", "Count", "--seed", "7")
    assert (result.exit_code, result.stdout) == (0, "one two three\n")
    request = cli.served.controller.requests[-1]
    assert (request.deployment, request.seed) == ("deployments/new-model", 7)
    assert [(m.role, m.content) for m in request.messages] == [("user", "Count")]
    # and what is deployed is used: by its model, and by its name
    for model in ("org/New-Model", "qa"):
        assert cli("run", model, "Count").exit_code == 0
    assert len(cli.document("ls")) == 2


def test_run_answers_what_is_piped_in(cli: Cli) -> None:
    assert cli("run", "qa", input="Count\n").stdout == "one two three\n"
    assert cli.served.controller.requests[-1].messages[0].content == "Count"
    assert "standard input is empty" in cli("run", "org/never-deployed", input="").stderr
    assert [info["name"] for info in cli.document("ls")] == ["deployments/qa"]


def test_run_at_a_terminal_is_a_conversation(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dumont.cli.run.at_terminal", lambda: True)
    result = cli("run", "qa", input="Count\nAgain\n")
    assert result.exit_code == 0
    assert result.stdout.replace("> ", "") == "one two three\none two three\n"
    assert len(cli.served.controller.requests[-1].messages) == 3


def test_models_lists_what_the_nodes_have(cli: Cli) -> None:
    lines = [line.split() for line in cli("models").stdout.splitlines()]
    assert lines[1] == ["org/model", "causal_lm", "1.0", "GiB", "one"]
    assert lines[2][0] == "org/odd"
    assert "safetensors" in lines[2]
    assert [one["model"] for one in cli.document("models")] == ["org/model", "org/odd"]


def test_deploy_waits_for_the_start(cli: Cli) -> None:
    assert cli("deploy", "org/model", "--name", "new", "--prewarm", "--wait").exit_code == 0
    assert any(type(r).__name__ == "WatchStartRequest" for r in cli.served.controller.requests)


@pytest.mark.parametrize("command", ["generate", "embed"])
def test_an_empty_pipe_is_named(cli: Cli, command: str) -> None:
    for input in (None, "", " \n"):
        result = cli(command, "qa", input=input)
        assert result.exit_code == 1
        assert "standard input is empty" in result.stderr
    result = CliRunner().invoke(app, [command, "qa", "-"], input=b"\xff\xfe", env={"DUMONT_ENDPOINT": "a:1"})
    assert "[NOT_UTF8]" in result.stderr


def test_a_bare_command_at_a_terminal_waits_for_nothing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dumont.cli.inference.at_terminal", lambda: True)
    for command in ("generate", "embed"):
        result = cli(command, "qa", input="never read")
        assert result.exit_code == 1
        assert "pipe it in" in result.stderr


def test_embed_reads_a_text_from_each_line_that_is_piped_in(cli: Cli) -> None:
    for given in ((), ("-",)):
        result = cli("embed", "qa", *given, input="four\n\nseventh\n")
        assert result.stdout == "4 0.5\n7 0.5\n"


def test_an_error_in_mid_answer_begins_on_its_own_line(cli: Cli) -> None:
    result = cli("generate", "qa", "killed")
    assert result.exit_code == 1
    assert result.stdout == "one two three\n"
    assert result.stderr.splitlines()[1:] == [
        "error: instances/a ended while it answered: ended by SIGKILL [INSTANCE_GONE]"
    ]


def test_generate_sends_every_sampling_option(cli: Cli) -> None:
    cli(
        "generate", "qa", "Count", "--top-k", "40", "--min-p", "0.125", "--repetition-penalty", "1.5",
        "--presence-penalty", "0.5", "--frequency-penalty", "-0.5", "--logit-bias", "7=-100",
        "--logit-bias", "8=0.5", "--stop-token-id", "3", "--ignore-eos", "--min-new-tokens", "2",
    )  # fmt: skip
    request = cli.served.controller.requests[-1]
    assert (request.top_k, request.min_p, request.repetition_penalty) == (40, 0.125, 1.5)
    assert (request.presence_penalty, request.frequency_penalty) == (0.5, -0.5)
    assert dict(request.logit_bias) == {7: -100.0, 8: 0.5}
    assert (list(request.stop_token_ids), request.ignore_eos, request.min_new_tokens) == ([3], True, 2)
    assert cli("generate", "qa", "Count", "--logit-bias", "x").exit_code == 2


def test_generate_in_json_tells_how_likely_each_token_was(cli: Cli) -> None:
    _, first, *_ = cli.lines("generate", "qa", "Count", "--logprobs", "1")
    assert first["logprobs"] == [
        {
            "token_id": 1,
            "text": "one",
            "logprob": -0.5,
            "top": [{"token_id": 2, "text": "other", "logprob": -0.25}],
        }
    ]


def test_generate_writes_several_answers_one_after_the_other(cli: Cli) -> None:
    assert cli("generate", "qa", "Count", "-n", "2").stdout == "--- 1 ---\na0b0\n--- 2 ---\na1b1\n"
    *_, first, second = cli.lines("generate", "qa", "Count", "-n", "2")
    assert [(end["index"], end["finish_reason"]) for end in (first, second)] == [(0, "length"), (1, "stop")]


def test_embed_prints_one_vector_for_each_text(cli: Cli) -> None:
    assert cli("embed", "qa", "a", "bb").stdout == "1 0.5\n2 0.5\n"
    assert cli.document("embed", "qa", "a", "bb") == [[1, 0.5], [2, 0.5]]


def test_ps_lists_instances(cli: Cli) -> None:
    header, *rows = cli("ps").stdout.splitlines()
    assert header.split() == [
        "INSTANCE", "DEPLOYMENT", "STATE", "FROM", "NODE", "DEVICE", "PID", "MEMORY", "BUSY",
        "KV", "CACHE", "AGE",
    ]  # fmt: skip
    assert [row.split()[:3] for row in rows] == [[name, "qa", "serving"] for name in "abc"]
    assert [instance["pid"] for instance in cli.document("ps", "--deployment", "qa")] == [1, 2, 3]


def test_ps_shows_what_instances_take_and_are_at(cli: Cli) -> None:
    told = cli.served.controller.instances["instances/a"]
    told.in_flight, told.capacity.sequences, told.capacity.kv_tokens = 3, 128, 200_000
    told.load.running, told.load.waiting, told.load.kv_tokens_used = 3, 1, 50_000

    first, second, _ = cli("ps").stdout.splitlines()[1:]

    assert "3/128" in first
    assert "25% of 200,000" in first
    assert "/" not in second
    described = cli.document("ps")[0]
    assert described["capacity"] == {"sequences": 128, "kv_tokens": 200_000, "unbatched_reason": ""}
    assert described["load"] == {"running": 3, "waiting": 1, "kv_tokens_used": 50_000}
    assert cli.document("ps")[1]["capacity"] is None


def test_ps_says_why_an_instance_is_where_it_is(cli: Cli) -> None:
    told = cli.served.controller.instances["instances/a"]
    told.gpu, told.gpu_bytes, told.ram_bytes = "GPU-a", 6 << 30, 1 << 30
    told.reasons.extend(["local start: snapshots/one is on nodes/n1", "it yields to anyone"])
    first = cli("ps", "--why").stdout.splitlines()[1]
    assert "local start: snapshots/one is on nodes/n1; it yields to anyone" in first
    described = cli.document("ps", "--why")[0]
    assert described["reasons"] == list(told.reasons)
    assert (described["gpu"], described["gpu_bytes"], described["ram_bytes"]) == ("GPU-a", 6 << 30, 1 << 30)


def test_explain_says_what_a_request_would_do_and_why(cli: Cli) -> None:
    shown = cli("explain", "qa").stdout
    assert "local on nodes/n1: snapshots/one is on nodes/n1" in shown
    chosen, other = shown.splitlines()[-2:]
    assert chosen.split()[:7] == ["local", "n1", "one", "0.40", "s", "0.50", "s"]
    assert "instances/b parks: it was not used for 42 s" in chosen
    assert other.split()[:5] == ["cold", "n2", "the", "model", "15.00"]
    assert "n2 is full" in other

    described = cli.document("explain", "qa")
    assert [one["tier"] for one in described["candidates"]] == ["local", "cold"]
    assert described["candidates"][1]["why_not"] == "n2 is full"
    assert cli("explain", "none").exit_code == 1


def test_ps_watch_shows_each_change(cli: Cli) -> None:
    cli.served.controller.watch_ends = True
    first, second = cli.lines("ps", "--watch")
    assert first["instances"][0]["name"] == "instances/a"
    assert second["instances"][0]["name"] == "instances/b"
    assert cli("ps", "--watch").stdout.count("INSTANCE") == 2


def test_park_takes_an_instance_or_a_deployment(cli: Cli) -> None:
    assert [instance["state"] for instance in cli.document("park", "instances/a")] == ["parked"]
    assert [instance["state"] for instance in cli.document("park", "qa")] == ["parked"] * 3
    assert [instance["state"] for instance in cli.document("resume", "qa")] == ["serving"] * 3
    assert "serving" in cli("resume", "a").stdout


def test_migrate_names_a_gpu_or_a_node(cli: Cli) -> None:
    (moved,) = cli.document("migrate", "a", "--gpu", "1")
    assert (moved["name"], moved["gpu"]) == ("instances/a", "1")
    assert "successor" in cli("migrate", "instances/a", "--node", "two", "--cold").stdout
    refused = cli("migrate", "b", "--gpu", "1", "--node", "two")
    assert refused.exit_code == 1
    assert "GPU_OR_NODE" in refused.output


def test_stop_and_rm_end_things_quietly(cli: Cli) -> None:
    assert cli("stop", "a").output == ""
    assert cli.document("stop", "instances/b") == {"stopped": "b"}
    assert [instance["name"] for instance in cli.document("ps")] == ["instances/c"]
    assert cli("rm", "qa").output == ""
    assert cli.document("ls") == []


def test_logs_are_printed_as_they_come(cli: Cli) -> None:
    assert cli("logs", "a", "--follow", "--tail", "2").stdout == "loaded €\nready\n"
    assert cli.lines("logs", "a")[-1] == {"instance": "a", "text": "ready\n"}
    assert cli("logs", "qa").stdout.endswith("ready\n")


def test_logs_say_when_there_is_nothing(cli: Cli) -> None:
    result = cli("logs", "c")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "c has printed nothing so far\n"


def test_several_are_removed_and_a_wrong_one_does_not_stop_the_rest(cli: Cli) -> None:
    for name in ("one", "two"):
        cli("deploy", "org/model", "--name", name)
    result = cli("rm", "one", "nope", "two")
    assert result.exit_code == 1
    assert result.stderr.count("error:") == 1
    assert [info["name"] for info in cli.document("ls")] == ["deployments/qa"]
    assert cli.lines("rm", "qa") == [{"deleted": "qa"}]
    assert cli("snapshot", "rm", "one", "one").exit_code == 0


def test_stop_takes_a_deployment_as_park_and_resume_do(cli: Cli) -> None:
    assert cli("park", "a", "b").exit_code == 0
    assert [line["stopped"] for line in cli.lines("stop", "qa")] == ["a", "b", "c"]
    result = cli("stop", "qa")
    assert result.exit_code == 1
    assert "deployments/qa has no instance at present" in result.stderr
    result = cli("stop", "nope")
    assert "neither an instance nor a deployment 'nope'" in result.stderr


@pytest.mark.parametrize(
    "command", [("ps",), ("ps", "--watch"), ("snapshot", "ls"), ("logs", "-f")], ids=" ".join
)
def test_a_deployment_that_does_not_exist_is_no_empty_list(cli: Cli, command: tuple[str, ...]) -> None:
    cli.served.controller.no_snapshots = True
    option = () if command[0] == "logs" else ("--deployment",)
    result = cli(*command, *option, "nope")
    assert result.exit_code == 1
    assert "[DEPLOYMENT_NOT_FOUND]" in result.stderr


@pytest.mark.parametrize("command", [(), ("ps",), ("snapshot",), ("snapshot", "create"), ("node", "ls")])
def test_h_is_help(cli: Cli, command: tuple[str, ...]) -> None:
    result = cli(*command, "-h")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("dumont generate ", ["qa"]),
        ("dumont rm q", ["qa"]),
        ("dumont park ", ["a", "b", "c", "qa"]),
        ("dumont snapshot inspect ", ["one"]),
        ("dumont node drain ", ["one"]),
        ("dumont ps --deployment ", ["qa"]),
        ("dumont deploy x --start-mode c", ["checkpoint", "cold"]),
        ("dumont deploy x --storage ", ["local", "s3"]),
    ],
)
def test_names_and_choices_are_completed(cli: Cli, typed: str, offered: list[str]) -> None:
    result = CliRunner().invoke(
        app,
        [],
        env={
            "DUMONT_ENDPOINT": cli.served.address,
            "_DUMONT_COMPLETE": "complete_bash",
            "COMP_WORDS": typed,
            "COMP_CWORD": str(len(typed.split(" ")) - 1),
        },
        prog_name="dumont",
    )
    assert sorted(result.stdout.split()) == offered


def test_completion_is_quick_and_quiet_without_a_controller() -> None:
    result = CliRunner().invoke(
        app,
        [],
        env={
            "DUMONT_ENDPOINT": "localhost:1",
            "_DUMONT_COMPLETE": "complete_bash",
            "COMP_WORDS": "dumont rm ",
            "COMP_CWORD": "2",
        },
        prog_name="dumont",
    )
    assert result.output.strip() == ""


def test_snapshots_are_made_listed_shown_and_removed(cli: Cli) -> None:
    made = cli("snapshot", "create", "qa")
    assert "snapshot" in made.stdout
    assert "older is replaced, and deleted" in made.stderr
    assert cli.document("snapshot", "create", "qa", "--id", "mine")["deployment"] == "deployments/qa"
    assert cli("snapshot", "ls").stdout.splitlines()[1].split()[:4] == ["one", "qa", "active", "one"]
    assert cli.document("snapshot", "ls", "--deployment", "qa")[0]["size_bytes"] == 214_000_000
    inspected = cli("snapshot", "inspect", "one").stdout
    assert "204 MiB" in inspected
    assert "0.304s" in inspected
    assert "pages-1.img" in inspected
    assert cli.document("snapshot", "inspect", "one")["compatibility"] == {"criu": "4.1.1"}
    assert cli("snapshot", "rm", "one").output == ""
    assert cli.document("snapshot", "rm", "snapshots/one") == {"deleted": "one"}


def test_a_simulation_needs_no_service(cli: Cli) -> None:
    assert cli("simulate", "--nodes", "1", "--deployments", "2", "--hours", "0.01").exit_code == 0
    assert cli("simulate", "--nodes", "none").exit_code == 2


def test_a_node_is_drained_and_what_is_left_is_told(cli: Cli) -> None:
    assert cli("node", "drain", "one").exit_code == 0
    assert "ready, draining" in cli("node", "ls").stdout
    left = cli("node", "drain", "one", "--deadline", "1m")
    assert left.exit_code == 1
    assert "INSTANCE_BUSY: it answers" in left.stdout
    assert cli("node", "undrain", "one").exit_code == 0
    assert cli.document("node", "ls")[0]["draining"] is False


def test_nodes_are_listed(cli: Cli) -> None:
    assert "16.0 GiB" in cli("node", "ls").stdout
    assert "H 20.0 GiB of 80.0 GiB free" in cli("node", "ls").stdout
    (described,) = cli.document("node", "ls")
    assert described["gpus"][0]["memory_free_bytes"] == 20 << 30
    assert (described["instance_memory_bytes"], described["instance_memory_limit_bytes"]) == (7, 9)
    assert cli.document("node", "ls")[0]["name"] == "nodes/one"


def test_a_failure_is_one_line_on_stderr(cli: Cli) -> None:
    result = cli("generate", "none", "Count")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: no deployments/none [DEPLOYMENT_NOT_FOUND]\n"


def test_a_failure_in_json_is_an_error_object(cli: Cli) -> None:
    result = cli("generate", "qa", "full", "--json")
    assert (result.exit_code, result.stderr) == (1, "")
    assert json.loads(result.stdout)["error"] == {
        "code": "RESOURCE_EXHAUSTED",
        "reason": "QUEUE_FULL",
        "message": "16 calls wait already",
        "field": None,
        "metadata": {},
        "retry_after": 1.0,
    }


def test_a_missing_controller_is_named_with_the_remedy(cli: Cli) -> None:
    result = cli("ls", "--endpoint", "unix:/nonexistent.sock")
    assert result.exit_code == 1
    assert "dumont up" in result.stderr
    assert "unix:/nonexistent.sock" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("deploy",),
        ("deploy", "org/model", "--ttl", "soon"),
        ("deploy", "org/model", "--ttl=-1s"),
        ("generate", "qa", "And you?", "--message", "Hi"),
        ("logs", "a", "--tail", "-1"),
        ("up", "--device", "tpu"),
        ("dance",),
    ],
)
def test_a_wrong_command_line_exits_with_2(cli: Cli, arguments: tuple[str, ...]) -> None:
    requests = len(cli.served.controller.requests)
    assert cli(*arguments).exit_code == 2
    assert len(cli.served.controller.requests) == requests


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("deploy", "org/model", "--start-mode", "hot"), "UNKNOWN_CHOICE"),
        (("deploy", "org/model", "--storage", "tape"), "UNKNOWN_CHOICE"),
        (("deploy", "org/model", "--weights", "half"), "UNKNOWN_CHOICE"),
        (("generate", "qa"), "NO_INPUT"),
        (("generate", "qa", "Hi", "--max-new-tokens", "0"), "INVALID_MAX_NEW_TOKENS"),
        (("rm", "nodes/one"), "INVALID_NAME"),
        (("stop", "A B"), "INVALID_ID"),
    ],
)
def test_a_wrong_argument_says_why(cli: Cli, arguments: tuple[str, ...], reason: str) -> None:
    result = cli(*arguments)
    assert result.exit_code == 1
    assert f"[{reason}]" in result.stderr


def test_the_version_is_told(cli: Cli) -> None:
    assert cli("--version").stdout.startswith("dumont 0.")


def test_every_command_offers_json(cli: Cli) -> None:
    commands = [
        "up", "deploy", "ls", "rm", "generate", "embed", "ps", "park", "resume", "stop", "logs", "doctor",
        "migrate", "node drain", "node undrain",
        "snapshot create", "snapshot ls", "snapshot inspect", "snapshot rm", "node ls",
    ]  # fmt: skip
    offered = [command for command in commands if "--json" in cli(*command.split(), "--help").stdout]
    assert offered == commands


def test_a_snapshot_is_verified_where_it_is_kept(cli: Cli) -> None:
    assert cli.document("snapshot", "verify", "one") == {"local_bytes": 2048, "published_bytes": 1024}
    shown = cli("snapshot", "verify", "one").stdout
    assert "2.0 KiB read, intact" in shown
    assert "1.0 KiB read, intact" in shown


@pytest.mark.parametrize(("flags", "node"), [((), ""), (("--node", "one"), "nodes/one")])
def test_a_snapshot_is_brought_to_a_node(cli: Cli, flags: tuple[str, ...], node: str) -> None:
    assert cli.document("snapshot", "prefetch", "one", *flags)["local"]
    asked = cli.served.controller.requests[-1]
    assert (asked.name, asked.node) == ("snapshots/one", node)
    assert "node+store" in cli("snapshot", "prefetch", "one", *flags).stdout


def test_orphans_are_shown_adopted_and_brought_back(cli: Cli) -> None:
    assert "orphan" in cli("snapshot", "ls", "--orphans").stdout
    assert [one["name"] for one in cli.document("snapshot", "ls", "--orphans")] == ["snapshots/lost"]
    assert not cli.document("snapshot", "ls")[0]["orphan"]
    assert cli.document("snapshot", "adopt", "lost")["deployment"] == "deployments/gone"
    adopted = cli.document("snapshot", "adopt", "lost", "--deployment", "qa")
    assert (adopted["deployment"], adopted["orphan"]) == ("deployments/qa", False)
    assert cli.document("snapshot", "undelete", "lost")["orphan"]
    assert "orphan" in cli("snapshot", "undelete", "lost").stdout


def test_a_damaged_snapshot_fails_its_verification_by_name(cli: Cli) -> None:
    result = cli("snapshot", "verify", "two", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout.splitlines()[-1])["error"]["reason"] == "CHUNK_DAMAGED"


@pytest.mark.parametrize(
    ("flags", "dry_run", "verb"), [((), False, "deleted"), (("--dry-run",), True, "would")]
)
def test_prune_says_what_it_deletes_or_would(
    cli: Cli, flags: tuple[str, ...], dry_run: bool, verb: str
) -> None:
    shown = cli("snapshot", "prune", *flags).stdout
    assert shown.splitlines()[-1].startswith(verb)
    assert "1 objects, 1.0 MiB; 3.0 MiB of chunks remain" in shown
    assert ("chunks/ab/ab12" in shown) is dry_run
    assert cli.served.controller.requests[-1].dry_run is dry_run
    document = cli.document("snapshot", "prune", *flags)
    assert (document["object_count"], document["dry_run"]) == (1, dry_run)


def test_inspect_tells_what_a_snapshot_takes_in_the_store(cli: Cli) -> None:
    shown = " ".join(cli("snapshot", "inspect", "one").stdout.split())
    assert "50.0 MiB in 25 chunks, 25.0% of the image" in shown
    assert "shared 40.0 MiB with other snapshots" in shown
    assert "encrypted yes" in shown
    assert "kept node+store" in shown
    assert cli.document("snapshot", "inspect", "one")["stored"]["unique_bytes"] == 10 << 20


def test_a_bench_is_refused_before_it_measures_what_it_cannot(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DUMONT_SNAPSHOTD_STORE_URL", raising=False)
    result = cli("bench", "--cases", "plain_cold,warm", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout.splitlines()[-1])["error"]["reason"] == "UNKNOWN_CASE"
    result = cli("bench", "--output", "/proc/none/bench.json")
    assert result.exit_code == 2
    assert "cannot be written" in result.output
    result = cli("bench", "--store", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout.splitlines()[-1])["error"]["reason"] == "OBJECT_STORE_NOT_CONFIGURED"
