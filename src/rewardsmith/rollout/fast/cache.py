"""Keys and values of prompts and completions in pages of 16 tokens, in one pool.

A prompt's pages are stored once and read by all of its completions; a completion owns the pages of its own tokens, so
nothing is moved when another one ends. Which page belongs to whom is kept in tables (`batch.Batch`). Memory is that of
the pages written to: pages that nobody touched cost nothing on CPUs.
"""

from __future__ import annotations

from torch import Tensor

from rewardsmith.rollout.model.architecture import Architecture

PAGE = 16  # tokens; kernels.c and the CUDA kernel have the same number


class Cache:
    """`keys` are layers x pages x kv heads x head_dim x PAGE: one vector holds a number of several tokens, which is how
    the kernels read them. `values` are layers x pages x kv heads x PAGE x padded head_dim.
    """

    def __init__(self, architecture: Architecture, like: Tensor) -> None:
        """With no page yet; of the type and on the device of `like`."""
        self._architecture = architecture
        self._like = like
        self.padded_dim = -(-architecture.head_dim // PAGE) * PAGE
        self.clear()

    def clear(self) -> None:
        """Gives all memory back."""
        self.keys, self.values = self._tensors(0)
        self._free: list[int] = []

    @property
    def pages(self) -> int:
        return self.keys.shape[1]

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def page_bytes(self) -> int:
        """Keys and values of one page in all layers."""
        shape = self._architecture
        numbers = len(shape.layers) * shape.kv_heads * PAGE * (shape.head_dim + self.padded_dim)
        return numbers * self._like.element_size()

    def grow(self, pages: int) -> None:
        """To so many pages; what is in them stays."""
        used = self.pages
        if pages <= used:
            return
        keys, values = self._tensors(pages)
        keys[:, :used], values[:, :used] = self.keys, self.values
        self.keys, self.values = keys, values
        # The last one is taken first: low numbers first, and again what was given back last, still in the CPU's caches.
        self._free = [*range(pages - 1, used - 1, -1), *self._free]

    def take(self, count: int) -> list[int]:
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return taken[::-1]

    def give_back(self, pages: list[int]) -> None:
        self._free += pages[::-1]

    def _tensors(self, pages: int) -> tuple[Tensor, Tensor]:
        shape = self._architecture
        first = (len(shape.layers), pages, shape.kv_heads)
        return self._like.new_empty(*first, shape.head_dim, PAGE), self._like.new_empty(*first, PAGE, self.padded_dim)


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)
