"""Evaluation of a model folder: suites, which are offline, and any task of lm-eval.

    command.py      `lrnn eval` (its --compare and --collect are in compare.py and collect.py)
    options.py      options become a request (request.py)
    evaluate.py     checks the request and the folder, runs the tasks, writes the result folder
    suites.py       the suites and their tasks
    task_objects.py names become lm-eval's task objects
    build.py        task objects become requests to the model, once, before it is loaded; their lengths are checked
    prompts.py      tokenizer, length of the context, chat template; bos.py: what a prompt begins with
    harness.py      the calls to lm-eval: model, run
    protocol.py     what two results must share to compare
    model.py        lm-eval's model with our rules; chunked.py answers on several devices, kept_answers.py keeps answers
    tasks/          the tasks as lm-eval reads them, with the functions that they name
    fetch_data.py   benchmark data, downloaded once into a cache
    sandbox.py      runs code written by a model; sandbox_child.py is its inner half
    report.py       lm-eval's results become results.json, table.md and samples

The model folder is checked by lrnn.eval.model_folder; tasks that run code need the user's permission.
"""
