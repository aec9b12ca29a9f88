"""Small stand-ins for data sets of the hub, as folders of copies: `FOLDER/allenai/sciq/data/test.parquet`."""

from datasets import Dataset

SCIQ = [
    {
        "question": f"What has {n} legs?",
        "support": f" Things have {n} legs.",
        "distractor1": "a",
        "distractor2": "b",
        "distractor3": "c",
        "correct_answer": "d",
    }
    for n in range(4)
]
PAGES = [{"page": " = One = \n Two three , four . \n"}, {"page": "five"}]  # 10 and 1 parts between white space


def write_hub_copies(folder):
    """Write copies of all data sets that tasks read, and return the folder."""
    _write(folder / "allenai" / "sciq", {"test": SCIQ, "train": SCIQ[:1]})
    _write(folder / "EleutherAI" / "wikitext_document_level", {"test": PAGES}, config="wikitext-2-raw-v1")
    return folder


def _write(folder, splits, config=None):
    data = folder / (config or "data")
    data.mkdir(parents=True)
    lines = ["---", "configs:", f"- config_name: {config or 'default'}", "  data_files:"]
    for split, rows in splits.items():
        Dataset.from_list(rows).to_parquet(data / f"{split}-00000-of-00001.parquet")
        lines += [f"  - split: {split}", f"    path: {data.name}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
