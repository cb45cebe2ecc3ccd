//! Key-value text, `path=x,ro`, to any serde type; sizes such as 512M.
