"""One self-contained HTML page of a collection of results: `lrnn eval --collect FOLDER ... --html FILE`.

    page.py        gathers what the page shows, and writes it
    page.html.j2   its template
    frame.html.j2  head, style and navigation, for other pages too
    curves.py      pictures: by checkpoint, by length, by position
    samples.py     prompts and answers to leaf through

The page needs neither scripts nor a network. The same results give the same bytes.
"""
