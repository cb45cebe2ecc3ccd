//! Port and memory-mapped I/O dispatch, and interrupt lines.
