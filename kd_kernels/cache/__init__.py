"""The offline teacher cache: what a teacher predicted for whole sequences, on disk, looked up by their tokens.

Scoring a corpus once and training from disk is only worth it if the rows that come back are the right ones. So a
sequence is named by a hash of its tokens, its layout, its teacher and its tokenizer; every byte is under a checksum;
and whatever does not fit raises :class:`CacheError`. FORMAT.md beside this file is the normative text on the files.
"""

from kd_kernels.cache.dataset import CachedBatch, CachedCollator, CachedDataset, CachedItem
from kd_kernels.cache.errors import CacheError
from kd_kernels.cache.key import content_key
from kd_kernels.cache.lock import writer_name
from kd_kernels.cache.manifest import CacheManifest
from kd_kernels.cache.masses import with_mass_one
from kd_kernels.cache.merge import Merged, merge
from kd_kernels.cache.reader import CacheReader
from kd_kernels.cache.recovery import recover
from kd_kernels.cache.rows import CachedRows
from kd_kernels.cache.writer import CacheWriter

__all__ = [
    "CacheError", "CacheManifest", "CacheReader", "CacheWriter", "CachedBatch", "CachedCollator", "CachedDataset",
    "CachedItem", "CachedRows", "Merged", "content_key", "merge", "recover", "with_mass_one", "writer_name",
]
