"""The model card: README.md of a weights folder, with the front matter the Hub reads."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData


def model_card(config: Mapping[str, Any], *, title: str | None = None, text: str = "", tags: Sequence[str] = ()) -> str:
    """Markdown with YAML front matter (licence, library, tags, `model-index` from the metrics).

    `config` is what config.json holds: `class_path`, `init_args` and, when known, `recipe`, `version`,
    `dataset`, `split`, `metrics` {name: number} and `parameters`. `text` goes under the title.
    """
    recipe = config.get("recipe")
    name = title or recipe or str(config["class_path"]).rpartition(".")[2]
    domain = str(recipe).partition("/")[0] if recipe else None
    labels = {"moezoo", *tags}
    if domain:
        labels.add(domain)
    if ".baselines." not in str(config["class_path"]):
        labels.add("mixture-of-experts")
    data = ModelCardData(
        license="apache-2.0",
        library_name="moezoo",
        tags=sorted(labels),
        model_name=str(name),
        eval_results=_eval_results(config, domain) or None,
    )
    body = [f"# {name}", text, _usage(config), _metric_table(config)]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in body if part) + "\n"


def _metrics(config: Mapping[str, Any]) -> dict[str, float]:
    # An undefined metric is null in config.json; the Hub's model-index has no such value.
    return {name: value for name, value in (config.get("metrics") or {}).items() if value is not None}


def _eval_results(config: Mapping[str, Any], domain: str | None) -> list[EvalResult]:
    dataset = str(config.get("dataset") or "unknown")
    return [
        EvalResult(
            task_type=domain or "other",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=config.get("split"),
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in _metrics(config).items()
    ]


def _usage(config: Mapping[str, Any]) -> str:
    class_path = str(config["class_path"])
    module, _, name = class_path.rpartition(".")
    if recipe := config.get("recipe"):
        code = f'import moezoo\n\nmodel = moezoo.load("{recipe}")'
    else:
        code = f'from {module} import {name}\n\nmodel = {name}.from_pretrained("path/to/this/folder")'
    return f"`{class_path}`, weights in safetensors.\n\n```python\n{code}\n```"


def _metric_table(config: Mapping[str, Any]) -> str:
    metrics = _metrics(config)
    if not metrics:
        return ""
    where = " ".join(str(config[key]) for key in ("dataset", "split") if config.get(key))
    rows = [f"| {metric} | {value:.6g} |" for metric, value in metrics.items()]
    return "\n".join(
        [f"Measured on {where}:\n" if where else "Measured:\n", "| metric | value |", "| --- | ---: |", *rows]
    )
