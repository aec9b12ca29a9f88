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
MATHQA = [
    {"Problem": "what is 2 + 3 ?", "options": "a ) 4 , b ) 5 , c ) 6 , d ) 7 , e ) none of these", "correct": "b"},
    {"Problem": "what is 9 - 8 ?", "options": "a ) 1 , b ) 2 , c ) 3.5 , d ) 17 , e ) 72", "correct": "a"},
]
PAGE = "Name: Widget Two. Maker: Acme Corporation. Weight: 12 kg. "
JRT = {
    "based-swde-v2": [
        {"text": f"{PAGE}Summary of information above... maker:", "key": "maker", "value": "Acme Corporation"},
        {"text": PAGE, "key": "weight", "value": "1"},  # too short an answer
    ],
    "based-fda": [{"text": f"{PAGE}weight:", "key": "weight", "value": "12 kg"}],
    "based-squad": [{"text": " Ann has a cat. It is called Tom.\nThe cat of Ann is called ", "value": "Tom"}],
    "based_triviaqa": [
        {"context": "[DOC] Oslo is a city. [PAR] ", "question": " Which city? ", "answers": ["Oslo", "Kristiania"]}
    ],
    "based_nq_2048": [
        {"context": "Mars is red. Which is red?", "question": "Which is red?", "answers": ["Mars"], "tok_pos": 3}
    ],
    "based_drop": [{"context": "They won 21 to 14.", "question": "How many points?", "answers": ["21"]}],
}


def write_hub_copies(folder):
    """Write copies of all data sets that tasks read, and return the folder."""
    _write(folder / "allenai" / "sciq", {"test": SCIQ, "train": SCIQ[:1]})
    _write(folder / "EleutherAI" / "wikitext_document_level", {"test": PAGES}, config="wikitext-2-raw-v1")
    _write(folder / "regisss" / "math_qa", {"test": MATHQA})
    for name, rows in JRT.items():
        _write(folder / "hazyresearch" / name, {"validation": rows})
    return folder


def _write(folder, splits, config=None):
    data = folder / (config or "data")
    data.mkdir(parents=True)
    lines = ["---", "configs:", f"- config_name: {config or 'default'}", "  data_files:"]
    for split, rows in splits.items():
        Dataset.from_list(rows).to_parquet(data / f"{split}-00000-of-00001.parquet")
        lines += [f"  - split: {split}", f"    path: {data.name}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
