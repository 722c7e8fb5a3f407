"""The prefix cache finds computed pages by their tokens. Independent of rows and devices.

The key of a full page is a hash of its tokens and of the key of the page before it, and so of all tokens before it. The
key of the first page starts from the salt of the request.

    page_size = 4        tokens   [ a b c d | e f g h | i j ]
                         keys       k0 = H(salt, a b c d)   k1 = H(k0, e f g h)     a page that is not full has no key

A key only gives a candidate. The lookup then compares the tokens of each page, starting from the first page. Therefore
different texts with equal keys are never confused, not even if the collision is an attack (CVE-2025-25183 was caused by
relying on Python's `hash`).
"""

import hashlib
from array import array
from dataclasses import dataclass, field
from weakref import WeakValueDictionary


@dataclass(eq=False)
class CachedPage:
    """A cache entry: a page of tokens that follows the entry `parent`. A root has no tokens and no parent."""

    key: bytes
    token_ids: list[int]
    parent: "CachedPage | None" = field(repr=False)
    pages: dict[int | None, int] = field(default_factory=dict)  # physical page, by the window of the layers
    keep_hint: bool = False  # a request has found a cached prefix, and this page is in its last window


class PrefixCache:
    """A tree of entries, found by their keys.

    The cache holds weak references. An entry lives as long as a page table caches its page, a row has the entry, or
    another entry follows it.
    """

    def __init__(self, page_size: int):
        self.page_size = page_size
        self._entries: WeakValueDictionary[bytes, CachedPage] = WeakValueDictionary()
        self._roots: WeakValueDictionary[str | None, CachedPage] = WeakValueDictionary()

    def root(self, salt: str | None) -> CachedPage:
        """Return the entry that all sequences of a salt start from. Different salts never share pages."""
        root = self._roots.get(salt)
        if root is None:
            key = hashlib.sha256(b"" if salt is None else b"salt" + salt.encode()).digest()
            root = self._roots[salt] = CachedPage(key, [], None)
        return root

    def find(self, token_ids: list[int], root: CachedPage) -> list[CachedPage]:
        """Return the entries of the known full pages that `token_ids` begins with."""
        chain = [root]
        for start in range(0, len(token_ids) - self.page_size + 1, self.page_size):
            tokens = token_ids[start : start + self.page_size]
            entry = self._child(chain[-1], tokens, chained_key(chain[-1].key, tokens))
            if entry is None:
                break
            chain.append(entry)
        return chain[1:]

    def add(self, parent: CachedPage, token_ids: list[int]) -> CachedPage:
        """Return the entry of the full page `token_ids` after `parent`; create it if it does not exist."""
        key = chained_key(parent.key, token_ids)
        entry = self._child(parent, token_ids, key)
        if entry is None:
            entry = CachedPage(key, token_ids, parent)
            # On a key collision, the other entry keeps the key, and `find` never returns this one.
            self._entries.setdefault(key, entry)
        return entry

    def _child(self, parent: CachedPage, token_ids: list[int], key: bytes) -> CachedPage | None:
        entry = self._entries.get(key)
        return entry if entry is not None and entry.parent is parent and entry.token_ids == token_ids else None


def chained_key(parent_key: bytes, token_ids: list[int]) -> bytes:
    return hashlib.sha256(parent_key + array("q", token_ids).tobytes()).digest()
