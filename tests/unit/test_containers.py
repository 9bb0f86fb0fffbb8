"""The container files and the shell scripts: linted, and in agreement with each other, setup.py and what lies in the repository.

Nothing is built here, which needs Docker, Apptainer and a registry.
"""

from __future__ import annotations

import importlib.util
import io
import os
import posixpath
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from unittest import mock

import pytest
from dockerfile_parse import DockerfileParser
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
CONTAINERS = ROOT / "containers"
SHELL_SCRIPTS = sorted(
    path
    for glob in ("scripts/*.sh", "scripts/*.sbatch", "tools/**/*.sh", "emb_pruner/**/*.sh", ".ci/run")
    for path in ROOT.glob(glob)
)
HOME = "/opt/megatron-prune"


def run(command: list, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)


def lint(tool: str, *arguments: object, text: str | None = None) -> str:
    """What a linter of the test extras has to say; nothing where all is well."""
    program = shutil.which(tool, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))
    assert program, f"{tool} is missing; it comes with: pip install -e '.[test]'"
    done = run([program, *arguments], input=text, cwd=ROOT)
    assert (done.returncode == 0) == (done.stdout == "") and not done.stderr, done
    return done.stdout


def shellcheck(text: str, shell: str) -> str:
    return lint("shellcheck", "--norc", "--format=gcc", f"--shell={shell}", "-", text=text)


def sections(text: str) -> dict[str, str]:
    """An Apptainer definition, cut where Apptainer cuts it: at lines that start with %. The header is called ``""``."""
    found, name = {"": ""}, ""
    for line in text.splitlines():
        if line.lstrip().startswith("%"):
            name = line.strip()[1:]
            assert name not in found, name
            found[name] = ""
        elif not line.lstrip().startswith("#"):
            found[name] += f"{line}\n"
    return found


def pairs(text: str, separator: str) -> dict[str, str]:
    """``key SEPARATOR value`` lines."""
    return {key.strip(): value.strip() for key, value in (line.strip().split(separator, 1) for line in text.strip().splitlines())}


@pytest.fixture(scope="module")
def dockerfile() -> DockerfileParser:
    return DockerfileParser(fileobj=io.BytesIO((CONTAINERS / "Dockerfile").read_bytes()))


@pytest.fixture(scope="module")
def definition() -> dict[str, str]:
    """The sections, with the build arguments' defaults filled in."""
    text = (CONTAINERS / "megatron-prune.def").read_text(encoding="utf-8")
    for name, value in pairs(sections(text)["arguments"], "=").items():
        text = re.sub(r"\{\{\s*" + name + r"\s*\}\}", value, text)
    assert "{{" not in text
    return sections(text)


@pytest.fixture(scope="module")
def installer():
    """containers/install.py as a module."""
    spec = importlib.util.spec_from_file_location("containers_install", CONTAINERS / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def package() -> dict:
    """What setup.py says."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


@pytest.fixture(scope="module")
def admitted(package) -> str:
    """The torch versions that setup.py admits."""
    return next(line.removeprefix("torch") for line in package["install_requires"] if re.match(r"torch\W", line))


def values(dockerfile: DockerfileParser, instruction: str) -> list[str]:
    return [step["value"] for step in dockerfile.structure if step["instruction"] == instruction]


def copied(dockerfile: DockerfileParser) -> dict[str, str]:
    """Repository path → path in the image, for every COPY."""
    found, folder = {}, "/"
    for step in dockerfile.structure:
        if step["instruction"] == "WORKDIR":
            folder = posixpath.join(folder, step["value"])
        elif step["instruction"] == "COPY":
            *sources, target = step["value"].split()
            for source in sources:
                into = target.endswith("/")
                found[source] = posixpath.normpath(posixpath.join(folder, target, posixpath.basename(source) if into else ""))
    return found


# Linting


def test_the_linters_object():
    """Were they to accept everything, the tests below would say nothing."""
    assert "SC2086" in shellcheck("rm $1\n", "sh")
    assert "DL3007" in lint("hadolint", "-", text="FROM debian:latest\n")


def test_dockerfile_is_clean():
    assert lint("hadolint", "--failure-threshold", "style", CONTAINERS / "Dockerfile") == ""


def test_run_steps_are_clean(dockerfile):
    steps = values(dockerfile, "RUN")
    assert steps
    for step in steps:
        assert shellcheck(f"{step}\n", "sh") == ""


@pytest.mark.parametrize("name", ["post", "environment", "runscript", "test"])
def test_definition_sections_are_clean(definition, name):
    assert definition[name].strip()
    assert shellcheck(definition[name], "sh") == ""


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_are_clean(script):
    follow = ["--external-sources", "--source-path=SCRIPTDIR"]
    assert lint("shellcheck", "--norc", "--format=gcc", "--shell=bash", *follow, script) == ""


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_that_are_run_can_be(script):
    """By their names alone; those without a first line that says how are sourced."""
    assert bool(script.stat().st_mode & 0o111) == script.read_text(encoding="utf-8").startswith("#!")


# Agreement


def test_definition_has_what_apptainer_knows(definition):
    assert set(pairs(definition[""], ":")) == {"Bootstrap", "From"}
    assert pairs(definition[""], ":")["Bootstrap"] == "docker"
    known = {"arguments", "files", "post", "environment", "runscript", "test", "labels", "help"}
    assert set(definition) == {"", *known}


def test_one_base_image(dockerfile, definition):
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", dockerfile.baseimage)
    assert pairs(definition[""], ":")["From"] == dockerfile.baseimage


def test_one_set_of_labels(dockerfile, definition, package):
    labels = pairs(definition["labels"], " ")
    assert labels == dockerfile.labels
    assert labels["org.opencontainers.image.base.name"] == dockerfile.baseimage
    assert labels["org.opencontainers.image.version"] == package["version"]


def test_both_copy_the_same_and_it_exists(dockerfile, definition):
    files = dict(line.split() for line in definition["files"].strip().splitlines())
    assert files == copied(dockerfile)
    for source, target in files.items():
        assert (ROOT / source).exists(), source
        assert target == f"{HOME}/{source}"


def test_nothing_else_is_sent_to_the_daemon(dockerfile):
    lines = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    assert lines[0] == "*" and lines[-1] == "**/__pycache__"
    assert {line.removeprefix("!") for line in lines[1:-1]} == set(copied(dockerfile))
    assert all(line.startswith("!") for line in lines[1:-1])


def test_named_paths_are_in_the_image(dockerfile, definition):
    """Whatever the files and their README call under /opt/megatron-prune has been copied there."""
    texts = [*values(dockerfile, "RUN"), *definition.values(), (CONTAINERS / "README.md").read_text(encoding="utf-8")]
    named = set(re.findall(HOME + r"/([\w./-]*\w)", " ".join(texts)))
    named |= set(re.findall(r"python3 (containers/\S+)", " ".join(values(dockerfile, "RUN"))))
    assert {"containers/install.py", "scripts/prune_llama.sh"} <= named
    for path in named:
        assert (ROOT / path).exists(), path
        assert any(path == source or path.startswith(f"{source}/") for source in copied(dockerfile)), path


def test_the_image_does_not_run_as_root(dockerfile):
    assert values(dockerfile, "USER")[-1] not in ("root", "0")
    steps = [step["instruction"] for step in dockerfile.structure]
    assert "RUN" not in steps[steps.index("USER") :]


# Versions


def test_table_of_images_agrees_with_setup(package, admitted, dockerfile):
    """Tag by tag: README.md says "yes" where setup.py admits the torch it names, and the default is one of those."""
    text = (CONTAINERS / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d\d\.\d\d-py3) \| (\S+) \| [^|]* \| (yes|no)\b", text, re.MULTILINE)
    assert len(rows) == text.count("-py3 |") and {answer for *_, answer in rows} == {"yes", "no"}
    for tag, torch, answer in rows:
        assert SpecifierSet(admitted).contains(torch, prereleases=True) == (answer == "yes"), tag
    carried = {tag: torch for tag, torch, answer in rows if answer == "yes"}
    comment = (CONTAINERS / "Dockerfile").read_text(encoding="utf-8")
    tag, torch, python = re.search(r"^# (\S+) carries torch (\S+) on Python ([\d.]+)\. ", comment, re.MULTILINE).groups()
    assert dockerfile.baseimage.endswith(f":{tag}-py3") and carried[f"{tag}-py3"] == torch
    assert SpecifierSet(package["python_requires"]).contains(python)


@pytest.mark.parametrize("torch", ["2.12.0a0+5aff3928d8.nv26.5", "2.13.0a0+9186a08b2c.nv26.7.59513937", "2.13.0"])
def test_installer_takes_torch(installer, torch):
    installer.check_torch(torch)


@pytest.mark.parametrize("torch", ["2.10.0a0+b4e4ee81d3", "2.11.0a0+a6c236b9fd.nv26.3", "2.14.0a0+4fdf77b940.nv26.8"])
def test_installer_refuses_torch(installer, admitted, torch):
    with pytest.raises(SystemExit) as refused:
        installer.check_torch(torch)
    assert torch in str(refused.value) and f"torch{admitted}" in str(refused.value)


def test_pip_is_held_back(installer, monkeypatch):
    """pip is told the image's own torch, and not the image's own constraint file."""
    seen = {}

    def pip(command, env, check):
        seen.update(command=command, constraints=Path(env["PIP_CONSTRAINT"]).read_text(encoding="utf-8").split())
        return subprocess.CompletedProcess(command, 0)

    built = {"torch": "2.13.0a0+9186a08b2c.nv26.7", "transformer-engine": "2.17.0+4329ff84", "apex": "0.1"}

    def version(name):
        if name not in built:
            raise installer.PackageNotFoundError(name)
        return built[name]

    monkeypatch.setenv("PIP_CONSTRAINT", "/etc/pip/constraint.txt")
    monkeypatch.setattr(installer, "version", version)
    monkeypatch.setattr(installer.subprocess, "run", pip)
    assert installer.install() == 0
    assert seen["constraints"] == [f"{name}=={built[name]}" for name in ("torch", "transformer-engine", "apex")]
    assert seen["command"][-2:] == ["--editable", f"{ROOT}[demo]"]


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is installed here")
def test_check_names_what_is_missing():
    done = run([sys.executable, CONTAINERS / "install.py", "--check"])
    assert done.returncode == 1 and done.stderr.startswith("transformer_engine.pytorch cannot be imported")


# Running


@pytest.mark.parametrize(("given", "runs"), [([], ["megatron-prune", "--help"]), (["torchrun", "a b"], ["torchrun", "a b"])])
def test_runscript(definition, tmp_path, given, runs):
    """It runs what it is given, word by word, and says what there is where it is given nothing."""
    program = tmp_path / runs[0]
    program.write_text('#!/bin/sh\nprintf "%s\\n" "${0##*/}" "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = run(["sh", "-c", definition["runscript"], "runscript", *given], env=environment)
    assert done.stdout.splitlines() == runs, done.stderr


def test_slurm_starts_the_container_on_each_machine(tmp_path):
    """README.md's command for several machines, with Slurm and Apptainer played by scripts."""
    fakes = {
        "scontrol": "echo first; echo second",
        "srun": 'echo "$1 $2"; shift 2; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "apptainer": 'echo "$NODE_RANK/$NNODES" "$MASTER_ADDR:$MASTER_PORT" "$OMP_NUM_THREADS" "$@"',
    }
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    text = (CONTAINERS / "README.md").read_text(encoding="utf-8")
    inside = re.search(r"scripts/slurm\.sbatch -c \\\n  '([^']*)'", text).group(1)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "first,second", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_CPUS_ON_NODE": "96", "TP": "8", "PP": "2"}
    for name in ("MASTER_PORT", "OMP_NUM_THREADS", "NPROC_PER_NODE", "DP", "SLURM_CPUS_PER_TASK"):
        environment.pop(name, None)
    command = ["bash", ROOT / "scripts/slurm.sbatch", "-c", inside]
    done = run(command, env=environment)
    rest = inside.removeprefix("exec apptainer ")
    step, *machines = done.stdout.splitlines()
    assert step == "--kill-on-bad-exit=1 --cpus-per-task=96"
    assert machines == [f"{rank}/2 first:20007 12 {rest}" for rank in (0, 1)], done.stderr
    fewer = {"SLURM_CPUS_PER_TASK": "4"}  # than there are processes: one thread each
    done = run(command, env=environment | fewer)
    assert done.stdout.split()[1] == "--cpus-per-task=4" and "first:20007 1 " in done.stdout, done.stderr
    assert run(command, env=environment | {"OMP_NUM_THREADS": "3"}).stdout.count("first:20007 3 ") == 2
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    done = run(command, env=environment)
    assert done.returncode and not done.stdout  # nothing starts where nobody knows the first machine
