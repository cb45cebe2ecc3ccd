//! One virtual machine: its configuration, its building, its threads and its end.
