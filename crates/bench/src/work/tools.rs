//! Kept tools, where the root folder has them.

use super::Group;

/// The groups that kept tools measure.
pub(super) const ALL: [Group; 0] = [];
