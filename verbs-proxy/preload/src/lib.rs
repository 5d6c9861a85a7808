//! libibverbs.so.1 as the container sees it.
