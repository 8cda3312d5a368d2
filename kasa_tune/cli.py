"""The command line `kasa-tune run|ls|cp|cat|validate` for the recipes and configs of this package.

It does what torchtune's `tune` does, and it does not need the entry point that extends `tune`. All
commands except `run` work without importing torch.
"""

import argparse
import os
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from kasa_tune import __version__, registry, torchao_bridge
from kasa_tune.errors import INTERRUPTED, STATUS_INTERRUPTED, is_expected, sentence

_RUN_USAGE = "kasa-tune run [TORCHRUN-OPTIONS] <recipe> --config <config> [key=value ...]"
_RUN_HELP = f"""usage: {_RUN_USAGE}

Run a recipe. Recipe and config are names from `kasa-tune ls` or paths to files of your own.
The recipe runs in this process, or through torchrun if options of torchrun precede it.

examples:
    kasa-tune run kasa_finetune_single_device --config tiny_kasa
    kasa-tune run kasa_finetune_single_device --config llama3_8b_kasa model.rank=16 seed=1
    kasa-tune run ./my_recipe.py --config ./my_config.yaml
    kasa-tune run --nproc_per_node 2 my_distributed_recipe.py --config my_config.yaml
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`. The default is the command line of this process.

    Returns:
        The exit status. It is 0, or 2 for a mistake in the command line, which a message on stderr
        explains. `run` passes on what its recipe returns or raises, `SystemExit` included.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["run"]:
        # The arguments of `run` begin with torchrun's options, which torchrun's parser reads.
        return _run(argv[1:])
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.command == "validate":  # argparse does not assign overrides that follow an option
        args.overrides += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        status = args.func(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has closed the pipe, as in `kasa-tune ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not is_expected(error):
            raise
        return _fail(args.command, error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kasa-tune",
        description="Run, list, copy, print and check the recipes and configs of kasa_tune.",
    )
    parser.add_argument("--version", action="version", version=f"kasa_tune {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="run|ls|cp|cat|validate"
    )
    commands.add_parser(
        "run", help="run a recipe, in this process or through torchrun", usage=_RUN_USAGE
    )

    ls = commands.add_parser("ls", help="list all recipes and configs")
    ls.set_defaults(func=_ls)

    cp = commands.add_parser("cp", help="copy a recipe, a config or prompts, to edit them")
    cp.add_argument("file", help="name or path of a recipe or config, or kasa_tune://prompts/...")
    cp.add_argument(
        "destination", type=Path, help="file or folder to copy to; a missing suffix is added"
    )
    cp.add_argument(
        "-n", "--no-clobber", action="store_true", help="leave an existing file as it is"
    )
    cp.add_argument(
        "--make-parents", action="store_true", help="create missing folders above the destination"
    )
    cp.set_defaults(func=_cp)

    cat = commands.add_parser("cat", help="print a config or recipe")
    cat.add_argument("file", help="name or path of a config or recipe")
    cat.add_argument(
        "--sort",
        action="store_true",
        help="print a config's keys in sorted order, without its comments",
    )
    cat.set_defaults(func=_cat)

    validate = commands.add_parser("validate", help="check a config without running it")
    validate.add_argument("config", help="name or path of a config")
    validate.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to check it with"
    )
    validate.add_argument(
        "--recipe",
        metavar="NAME_OR_PATH",
        help="the recipe that will run it: a name, or a copy with keys of its own",
    )
    validate.add_argument(
        "--skip-files",
        action="store_true",
        help="do not look for the model and data files it names",
    )
    validate.set_defaults(func=_validate)
    return parser


def _ls(args: argparse.Namespace) -> int:
    print(f"{'RECIPE':<40} CONFIG")
    for recipe in registry.recipes():
        names = [config.name for config in recipe.configs] or ["<>"]
        for first, name in zip([recipe.name] + [""] * len(names), names):
            print(f"{first:<40} {name}")
    return 0


def _cp(args: argparse.Namespace) -> int:
    source, destination = _find_either(args.file), args.destination.expanduser()
    if destination.is_dir():
        destination = destination / source.name
    elif destination.suffix != source.suffix:
        destination = destination.with_name(destination.name + source.suffix)
    if destination.exists():
        if args.no_clobber:
            print(f"{destination} exists and was left as it is.")
            return 0
        if destination.samefile(source):
            raise ValueError(f"{destination} is the file to copy. Give another destination.")
    if args.make_parents:
        destination.parent.mkdir(parents=True, exist_ok=True)
    elif not destination.parent.is_dir():
        raise FileNotFoundError(
            f"There is no folder {destination.parent}. Create it, or add --make-parents."
        )
    copy = shutil.copytree if source.is_dir() else shutil.copyfile
    copy(source, destination)
    print(f"Copied {source.stem} to {destination}")
    return 0


def _cat(args: argparse.Namespace) -> int:
    path = _find_either(args.file)
    text = path.read_text(encoding="utf-8")
    if args.sort and path.suffix != ".py":
        import yaml

        try:
            text = yaml.safe_dump(yaml.safe_load(text), sort_keys=True, allow_unicode=True)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from error
    print(text, end="" if text.endswith("\n") else "\n")
    return 0


def _validate(args: argparse.Namespace) -> int:
    path = registry.find_config(args.config)
    from kasa_tune import config  # not above, because omegaconf would slow down other commands

    schema = None
    if args.recipe is not None:
        from kasa_tune.config.recipe_schemas import schema_of_recipe

        schema = schema_of_recipe(registry.find_recipe(args.recipe))
    config.validate_file(path, args.overrides, schema, check_files=not args.skip_files)
    print(f"{args.config}: the config is valid.")
    return 0


def _find_either(name_or_path: str) -> Path:
    """Return the path of a recipe or config, given its name, or of any file, given its path. A path
    with `kasa_tune://` is that of a file or folder in the package.
    """
    if name_or_path.startswith(registry.RESOURCE_SCHEME):
        return registry.resource(name_or_path)
    try:
        return registry.find_recipe(name_or_path)
    except FileNotFoundError:
        pass
    try:
        return registry.find_config(name_or_path)
    except FileNotFoundError:
        pass
    names = [entry.name for entry in (*registry.recipes(), *registry.configs())]
    hint = registry.did_you_mean(name_or_path, names) or "`kasa-tune ls` lists all names."
    raise FileNotFoundError(f"No recipe or config named {name_or_path!r}, and no such file. {hint}")


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_RUN_HELP, end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    try:
        options, recipe, recipe_args = _split_run(argv)
        path = registry.find_recipe(recipe)
        recipe_args = _with_config_path(recipe_args, path)
        if options:
            _check_distributed(path)
    except Exception as error:
        if not is_expected(error):
            raise
        return _fail("run", error)
    if options:
        from torch.distributed import run as torchrun

        # Each process begins with this package, which torchtune needs beside a new torchao.
        ours = ["--module", "kasa_tune", "run"]
        torchrun.main([*_standalone(options), *options, *ours, str(path), *recipe_args])
        return 0
    for folder in (os.getcwd(), str(path.parent)):  # a config may name components in these
        if folder not in sys.path:
            sys.path.append(folder)
    sys.argv = [str(path), *recipe_args]
    torchao_bridge.quiet()
    try:
        runpy.run_path(str(path), run_name="__main__")
    except KeyboardInterrupt:  # while the recipe's imports go on
        print(INTERRUPTED, file=sys.stderr)
        return STATUS_INTERRUPTED
    return 0


def _split_run(argv: list[str]) -> tuple[list[str], str, list[str]]:
    """Split the arguments of `run` into torchrun's options, the recipe, and the recipe's own
    arguments.
    """
    if not argv[0].startswith("-"):
        return [], argv[0], argv[1:]
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    parser.prog, parser.usage = "kasa-tune run", _RUN_USAGE
    parsed = parser.parse_args(argv)
    if parsed.module or parsed.no_python:
        raise ValueError(
            "--module and --no-python cannot be used with a recipe. Give its name or the path of "
            "its file."
        )
    recipe_args = parsed.training_script_args
    return argv[: len(argv) - len(recipe_args) - 1], parsed.training_script, recipe_args


def _with_config_path(recipe_args: list[str], recipe: Path) -> list[str]:
    """Return the recipe's arguments with the value of `--config` replaced by the path that it
    stands for.
    """
    for i, argument in enumerate(recipe_args):
        if argument.startswith("--config="):
            return [*recipe_args[:i], "--config", _config_path(argument[9:]), *recipe_args[i + 1 :]]
        if argument == "--config" and i + 1 < len(recipe_args):
            return [*recipe_args[: i + 1], _config_path(recipe_args[i + 1]), *recipe_args[i + 2 :]]
        if argument in ("-h", "--help"):
            return recipe_args
    names = [
        config.name
        for entry in registry.recipes()
        if entry.path == recipe
        for config in entry.configs
    ]
    shown = f" Configs of this recipe: {', '.join(names)}." if names else ""
    raise ValueError(f"{recipe.stem} needs --config with a name or the path of a YAML file.{shown}")


def _config_path(name_or_path: str) -> str:
    return str(registry.find_config(name_or_path))


def _check_distributed(path: Path) -> None:
    for recipe in registry.recipes():
        if recipe.path == path and not recipe.supports_distributed:
            raise ValueError(f"{recipe.name} runs in one process. Remove torchrun's options.")


def _standalone(options: list[str]) -> list[str]:
    """Return `--standalone` unless the options say where the processes meet.

    With this option, several runs on one machine do not need a port each.
    """
    rendezvous = ("rdzv", "master", "node", "nnodes", "standalone")
    names = [
        option.lstrip("-").replace("-", "_").split("=")[0]
        for option in options
        if option.startswith("-")
    ]
    return [] if any(name.startswith(rendezvous) for name in names) else ["--standalone"]


def _fail(command: str, error: Exception) -> int:
    told = str(error) if isinstance(error, ValueError) else sentence(error)
    print(f"kasa-tune {command}: {told}", file=sys.stderr)
    return 2
