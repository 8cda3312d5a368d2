"""A strict reader of pages: what is open is closed, and what a page would load or run is found."""

from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link", "base", "source", "embed", "area", "col", "wbr"}


class Page(HTMLParser):
    """A page that was read. ``text`` is what a reader sees; ``faults`` should be empty."""

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.faults, self.elements = [], [], []
        self.text = self.style = ""
        self.feed(content)
        self.close()
        self.faults += [f"<{tag}> is never closed" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if len({name for name, _ in attrs}) < len(attrs):
            self.faults.append(f"<{tag}> has an attribute twice")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes nothing")

    def handle_data(self, data):
        if "style" in self.open:
            self.style += data
        else:
            self.text += data

    def handle_comment(self, data):
        self.faults.append(f"a comment: {data[:40]}")

    def attributes(self):
        return [(tag, name, value) for tag, attrs in self.elements for name, value in attrs.items()]
