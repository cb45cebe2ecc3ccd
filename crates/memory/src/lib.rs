//! Guest RAM and the table of guest-physical addresses.
