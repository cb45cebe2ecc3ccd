//! Several machines from one file: what the file says, whether it can be, and what it comes to. Nothing here starts or
//! changes anything; the program beside it, `vmm-fleet`, does.
//!
//! | module | what it holds |
//! |---|---|
//! | [`spec`] | the file's types |
//! | [`check`](mod@check) | reads the file, and says everything that is wrong with it at once |
//! | [`plan`] | addresses and names of machines, their command lines, and the order of services |
//! | [`rules`] | who may talk to whom, as nftables' text; names, as dnsmasq's |

pub mod check;
pub mod plan;
pub mod rules;
pub mod spec;
