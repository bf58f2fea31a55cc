"""What the documents say about speed, rendered from the results of the benchmarks.

    python benchmarks/report.py    # after any of them has written its JSON into benchmarks/results

All of it goes into docs/performance.md, and the rows that matter most into README.md, each between two markers; a test
holds both equal to what this script renders.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
README = FOLDER.parent / "README.md"
DOCUMENT = FOLDER.parent / "docs" / "performance.md"
START, END = "<!-- performance: made by benchmarks/report.py -->", "<!-- end of performance -->"


class Row(NamedTuple):
    what: str
    ours: str
    beside: str
    comparison: str
    is_in_readme: bool


def training_loss_rows(result: dict[str, Any]) -> list[Row]:
    return [
        Row(
            f"stage-2 training step, {row['size']} `{row['backend']}`, {row['image']} pixels, batch "
            f"{row['batch_size']}, prompts of {row['prompt_tokens']} tokens, {row['vocabulary']:,} vocabulary rows",
            _ms(row["ours_ms"]),
            f"full logits: {_ms(row['full_ms'])}",
            f"{row['time_ratio']}x faster ({row['time_ratio_torch']}x on torch's own kernels), "
            f"{row['memory_ratio']}x less extra memory; the loss alone {row['time_ratio_alone']}x and "
            f"{row['memory_ratio_alone']}x",
            is_in_readme=row["backend"].endswith("_chat") and row["image"] == "96x96",
        )
        for row in result["results"]
    ]


def decoding_rows(result: dict[str, Any]) -> list[Row]:
    return [
        Row(
            f"decoding codes, {row['size']} `{row['backend']}` of {row['vocabulary']:,} rows, batch {row['batch']}, "
            f"S={row['S']}, K={row['K']}",
            _ms(row["constrained_ms"]),
            f"its floor: {_ms(row['floor_ms'])}; `generate`: {_ms(row['generate_ms'])}, on torch's own kernels "
            f"{_ms(row['generate_torch_ms'])}",
            f"{row['constrained_over_floor']}x the floor, {row['generate_over_constrained']}x and "
            f"{row['generate_torch_over_constrained']}x faster than `generate`",
            is_in_readme=(row["batch"], row["S"]) == (1, 4) and row["backend"] == "qwen_chat",
        )
        for row in result["results"]
    ]


def outside_model_rows(result: dict[str, Any]) -> list[Row]:
    return [
        Row(
            f"outside the model in a training step, {result['size']} `{row['backend']}`, batch {row['batch_size']}, "
            f"{row['instructions']} instructions",
            _ms(row["outside_ms"]),
            f"whole step: {_ms(row['step_ms'])}",
            f"{100 * row['outside_share']:.1f}% of the step",
            is_in_readme=row["instructions"] == "known",
        )
        for row in result["results"]
    ]


def smolvla_rows(result: dict[str, Any]) -> list[Row]:
    policies = result["policies"]
    peer, rows = policies["smolvla"], []
    kernels, names = "", ("matched", "same_heads", "defaults")
    if result["mkl"]:
        kernels, names = ", MKL on both sides", ("matched", "same_heads")
    beside = f"`smolvla`, expert of {_millions(peer)}"
    kinds = (("chunk", "chunk of 50 actions"), ("training_step", f"training step, batch {result['batch_size']}"))
    for part, title in kinds:
        for name in names:
            ours = policies[name]
            rows.append(
                Row(
                    f"`prefix_flow` {title}, {name.replace('_', ' ')}{kernels}: expert of {_millions(ours)}",
                    _ms(ours[f"{part}_ms"]),
                    f"{beside}: {_ms(peer[f'{part}_ms'])}",
                    f"{ours[f'{part}_ratio']}x its time",
                    is_in_readme=name in ("matched", "same_heads") and not result["mkl"],
                )
            )
    return rows


def vocabulary_rows(result: dict[str, Any]) -> list[Row]:
    return [
        Row(
            f"stage-2 training step with its optimizer, {size} `qwen_chat`, batch {row['batch_size']}, code rows "
            f"alone of {row['vocabulary']:,}",
            _ms(row["code_rows_ms"]),
            f"all rows: {_ms(row['all_ms'])}",
            f"{row['ms_ratio']}x faster, {row['held_mb_ratio']}x less held by gradients and optimizer, "
            f"{row['extra_mb_ratio']}x less extra memory",
            is_in_readme=False,
        )
        for size, row in result["results"].items()
    ]


def flow_expert_rows(result: dict[str, Any]) -> list[Row]:
    return [
        Row(
            f"`prefix_flow` expert alone of {row['parameters'] / 1e6:.1f}M parameters, batch {row['batch_size']}, "
            f"chunk of {row['chunk_size']}, prefix of {row['prefix_tokens']} tokens projected once",
            _ms(row["cached_ms"]),
            f"projected in every flow step: {_ms(row['naive_ms'])}",
            f"{row['speedup']}x faster",
            is_in_readme=False,
        )
        for row in result["results"]
    ]


def labelling_rows(result: dict[str, Any]) -> list[Row]:
    return [
        Row(
            f"labelling a frame, {name}, on two cores",
            _ms(row["label_ms"]),
            f"decoding alone: {_ms(row['decode_ms'])}{_by_lerobot(row)}; LeRobot's items: {_ms(row['items_ms'])}",
            f"{row['label_over_decode']}x decoding, with an encoder of {_ms(row['encode_ms'])} a frame",
            is_in_readme=name in ("128x128 images", "128x128 video"),
        )
        for name, row in result["results"].items()
    ]


def _by_lerobot(row: dict[str, Any]) -> str:
    return "" if row["lerobot_ms"] is None else f"; by LeRobot's decoder: {_ms(row['lerobot_ms'])}"


def labelling_memory_rows(result: dict[str, Any]) -> list[Row]:
    small, large = result["results"].values()
    return [
        Row(
            f"peak memory of labelling {large['frames']:,} frames of 64x64",
            f"{large['peak_mb']:.0f} MB",
            f"{small['frames']:,} frames: {small['peak_mb']:.0f} MB",
            f"{large['peak_mb'] / small['peak_mb']:.2f}x",
            is_in_readme=True,
        )
    ]


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], list[Row]]]] = {
    "training_loss": ("training_loss.py", training_loss_rows),
    "decoding": ("decoding.py", decoding_rows),
    "vocabulary": ("vocabulary.py", vocabulary_rows),
    "outside_model": ("outside_model.py", outside_model_rows),
    "flow_expert": ("flow_expert.py", flow_expert_rows),
    "smolvla": ("smolvla.py", smolvla_rows),
    "smolvla_mkl": ("smolvla.py --mkl", smolvla_rows),
    "labelling": ("labelling.py", labelling_rows),
    "labelling_memory": ("labelling.py --memory_episodes 4 400", labelling_memory_rows),
}


def render(results: Path = RESULTS) -> tuple[str, str]:
    """What stands between the markers of the README, and of the document.

    Raises:
        ValueError: a benchmark has left no result there.
    """
    rows: list[Row] = []
    commands, machines = [], []
    for name, (command, make_rows) in SECTIONS.items():
        path = results / f"{name}.json"
        command = f"python benchmarks/{command} --output benchmarks/results/{name}.json"
        if not path.is_file():
            raise ValueError(
                f"performance: expected the result of every benchmark in {results}, got no {path.name}. "
                f"Next step: {command}"
            )
        result = json.loads(path.read_text())
        rows += make_rows(result)
        commands.append(command)
        machines.append(_describe(result["machine"]))
    measured = (
        f"Measured on {'; '.join(dict.fromkeys(machines))}, in float32 with random weights. `tiny` is 128 wide with\n"
        "3 layers, `small` 768 wide with 8. The floor of decoding is vision, prefill and S-1 steps of one token. The\n"
        "sides of a row took turns in one process; times are medians, and ratios hold where milliseconds do not."
    )
    made_by = "\n".join(["```bash", *commands, "python benchmarks/report.py", "```"])
    most = _table([row for row in rows if row.is_in_readme])
    return (
        f"{measured}\n\n{most}\n\nThe other rows and the commands are in [docs/performance.md](docs/performance.md).",
        f"{measured}\n\n{_table(rows)}\n\nThe results are in `benchmarks/results`; these commands make them and this "
        f"table:\n\n{made_by}",
    )


def insert(text: str, section: str, *, title: str) -> str:
    """`text` with `section` between the markers.

    Args:
        title: of the text, for the message.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end) or START in after or END in before:
        raise ValueError(
            f"{title}: expected {START!r} and then {END!r}, once each, got something else. Next step: put them back."
        )
    return f"{before}{START}\n{section}\n{END}{after}"


def _table(rows: list[Row]) -> str:
    lines = [("what", "HLRP", "beside it", "ratio"), ("---",) * 4, *(row[:4] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _describe(machine: dict[str, Any]) -> str:
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return f"{machine['cpu']} ({machine['cores']} cores, {threads}, torch {machine['torch']})"


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value:,.0f} ms"


def _millions(policy: dict[str, Any]) -> str:
    parameters, in_each_step = policy["expert_parameters"] / 1e6, policy["parameters_in_each_flow_step"] / 1e6
    return f"{parameters:.1f}M parameters, {in_each_step:.1f}M in each flow step, {policy['expert_layers']} layers"


def main() -> None:
    for path, section in zip((README, DOCUMENT), render(), strict=True):
        path.write_text(insert(path.read_text(), section, title=path.name))
        print(f"written to {path}")


if __name__ == "__main__":
    main()
