"""Which tokens lie on which pages, so that a request finds what others have computed. Knows no rows and no devices.

A full page is known by a hash of its tokens and of all that comes before them: the hash of the page before. The first
one starts from the request's salt.

    page_size = 4        tokens   [ a b c d | e f g h | i j ]
                         keys       k0 = H(salt, a b c d)   k1 = H(k0, e f g h)     a page that is not full has none

A key only leads to a candidate. What decides is the comparison of the tokens of each page, one after the other from the
first: two texts of equal keys are never mistaken for one another, whether by accident or by intent (CVE-2025-25183 is
what became of trusting Python's `hash`).
"""

import hashlib
from array import array
from dataclasses import dataclass, field
from weakref import WeakValueDictionary


@dataclass(eq=False)
class CachedPage:
    """A page of tokens that follows the page `parent`. The root of each salt has no tokens and no parent."""

    key: bytes
    token_ids: list[int]
    parent: "CachedPage | None" = field(repr=False)
    pages: dict[int | None, int] = field(default_factory=dict)  # its physical page, by the window of the layers
    keep_hint: bool = False  # a request has come whose beginning it is at the end of


class PrefixCache:
    """A tree of pages, by their keys. An entry lives as long as anybody refers to it: a page table that keeps the page,
    a row that holds it, or an entry that follows it."""

    def __init__(self, page_size: int):
        self.page_size = page_size
        self._entries: WeakValueDictionary[bytes, CachedPage] = WeakValueDictionary()
        self._roots: WeakValueDictionary[str | None, CachedPage] = WeakValueDictionary()

    def root(self, salt: str | None) -> CachedPage:
        """Where the texts of a salt begin. Different salts share nothing, whatever the keys."""
        root = self._roots.get(salt)
        if root is None:
            key = hashlib.sha256(b"" if salt is None else b"salt" + salt.encode()).digest()
            root = self._roots[salt] = CachedPage(key, [], None)
        return root

    def find(self, token_ids: list[int], root: CachedPage) -> list[CachedPage]:
        """The known pages with which `token_ids` begin."""
        found, parent = [], root
        for start in range(0, len(token_ids) - self.page_size + 1, self.page_size):
            tokens = token_ids[start : start + self.page_size]
            entry = self._child(parent, tokens, chained_key(parent.key, tokens))
            if entry is None:
                break
            found.append(entry)
            parent = entry
        return found

    def add(self, parent: CachedPage, token_ids: list[int]) -> CachedPage:
        """The entry of the full page `token_ids` that follows `parent`, made if there is none."""
        key = chained_key(parent.key, token_ids)
        entry = self._child(parent, token_ids, key)
        if entry is None:
            entry = CachedPage(key, token_ids, parent)
            self._entries.setdefault(key, entry)  # a key that belongs to another text stays with it: no one finds this
        return entry

    def _child(self, parent: CachedPage, token_ids: list[int], key: bytes) -> CachedPage | None:
        entry = self._entries.get(key)
        return entry if entry is not None and entry.parent is parent and entry.token_ids == token_ids else None


def chained_key(parent_key: bytes, token_ids: list[int]) -> bytes:
    return hashlib.sha256(parent_key + array("q", token_ids).tobytes()).digest()
