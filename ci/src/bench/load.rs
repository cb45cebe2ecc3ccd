//! The loads of `bench io`: what the guest is told to do, and what its lines say.

use anyhow::{Context, Result};

use super::inside::Line;

/// One load.
pub(super) struct Load {
    pub(super) name: &'static str,
    kind: Kind,
    /// Requests, or MiB of a stream, in the short run of it.
    amount: u64,
}

enum Kind {
    /// What fio does, blocks of so many KiB, so many at once.
    Disk(&'static str, u64, u64),
    /// The guest sends.
    Send,
    /// The host sends.
    Receive,
    Respond,
}

/// What a load gave.
#[derive(Clone, Copy)]
pub(super) struct Figure {
    /// Of a request, or a MiB.
    pub(super) nanoseconds: u64,
    /// Exits of a thousand requests, or of a thousand MiB.
    pub(super) exits: u64,
}

/// How many times the short run the long one is.
const LONGER: u64 = 3;

const fn disk(name: &'static str, (mode, block, depth): (&'static str, u64, u64), amount: u64) -> Load {
    Load { name, kind: Kind::Disk(mode, block, depth), amount }
}

pub(super) const DISK: [Load; 6] = [
    disk("disk, random read 4 KiB, depth 32", ("randread", 4, 32), 1024),
    disk("disk, random write 4 KiB, depth 32", ("randwrite", 4, 32), 1024),
    disk("disk, random read 4 KiB, depth 1", ("randread", 4, 1), 512),
    disk("disk, random write 4 KiB, depth 1", ("randwrite", 4, 1), 512),
    disk("disk, sequential read 128 KiB, depth 32", ("read", 128, 32), 128),
    disk("disk, sequential write 128 KiB, depth 32", ("write", 128, 32), 128),
];
pub(super) const NET: [Load; 3] = [
    Load { name: "network, guest to host", kind: Kind::Send, amount: 8 },
    Load { name: "network, host to guest", kind: Kind::Receive, amount: 8 },
    Load { name: "network, request and response", kind: Kind::Respond, amount: 200 },
];

/// What the guest is told.
pub(super) fn script(load: &Load) -> String {
    let command = |(run, times)| {
        let (tag, amount) = (format!("{}-{run}", load.tag()), load.amount * times);
        match load.kind {
            Kind::Disk(mode, block, depth) => format!("disk {tag} {mode} {block}k {depth} {}k", amount * block),
            Kind::Send => format!("stream {tag} {amount}M"),
            Kind::Receive => format!("stream {tag} {amount}M -R"),
            Kind::Respond => format!("respond {tag} {amount}"),
        }
    };
    [("short", 1), ("long", LONGER)].map(command).join("; ")
}

impl Load {
    fn tag(&self) -> String {
        match self.kind {
            Kind::Disk(mode, block, depth) => format!("{mode}{block}-{depth}"),
            Kind::Send => "send".to_owned(),
            Kind::Receive => "receive".to_owned(),
            Kind::Respond => "respond".to_owned(),
        }
    }

    /// What the guest's lines say of this load; nothing if they do not name it.
    pub(super) fn figure(&self, lines: &[Line]) -> Result<Option<Figure>> {
        let Some((_, short)) = outcome(lines, &format!("{}-short", self.tag()))? else { return Ok(None) };
        let Some((value, long)) = outcome(lines, &format!("{}-long", self.tag()))? else { return Ok(None) };
        let nanoseconds = match self.kind {
            Kind::Disk(..) => 1e9 / value,
            Kind::Send | Kind::Receive => f64::from(8 << 20) * 1e9 / value,
            Kind::Respond => value,
        };
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is positive and far from 2^53")]
        let nanoseconds = nanoseconds.round() as u64;
        let exits = long.saturating_sub(short) * 1000 / ((LONGER - 1) * self.amount);
        Ok(Some(Figure { nanoseconds, exits }))
    }

    /// The figure in the unit that people use.
    pub(super) fn shown(&self, figure: &Figure) -> String {
        #[expect(clippy::cast_precision_loss, reason = "figures have fewer than 53 bits")]
        let nanoseconds = figure.nanoseconds as f64;
        match self.kind {
            Kind::Disk(..) => format!("{:.0}/s", 1e9 / nanoseconds),
            Kind::Send | Kind::Receive => format!("{:.2} Gb/s", f64::from(8 << 20) / nanoseconds),
            Kind::Respond => format!("{:.1} us", nanoseconds / 1e3),
        }
    }
}

/// The value of the line `TAG = VALUE`, and the exits from `begin TAG` to it.
fn outcome(lines: &[Line], tag: &str) -> Result<Option<(f64, u64)>> {
    let begin = lines.iter().find(|line| line.text.strip_prefix("begin ") == Some(tag));
    let end = lines.iter().find_map(|line| Some((line, line.text.strip_prefix(tag)?.strip_prefix(" = ")?)));
    let (Some(begin), Some((end, value))) = (begin, end) else { return Ok(None) };
    let value: f64 = value.parse().with_context(|| format!("{:?} has no figure", end.text))?;
    anyhow::ensure!(value > 0.0, "{:?} is no figure", end.text);
    Ok(Some((value, end.exits.saturating_sub(begin.exits))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(lines: &[(&str, u64)]) -> Vec<Line> {
        lines.iter().map(|(text, exits)| Line { text: (*text).to_owned(), exits: *exits }).collect()
    }

    #[test]
    fn a_figure_is_that_of_the_long_run_and_its_exits_are_the_difference_of_both() {
        let all = lines(&[
            ("begin randread4-32-short", 1000),
            ("randread4-32-short = 10000", 4000),
            ("begin randread4-32-long", 5000),
            ("randread4-32-long = 20000.5", 12_096),
        ]);
        let figure = DISK[0].figure(&all).unwrap().unwrap();
        assert_eq!((figure.nanoseconds, figure.exits), (49_999, 2000));
    }

    #[test]
    fn a_load_that_the_guest_did_not_end_has_no_figure() {
        let begun = lines(&[("begin send-short", 1), ("send-short = 8", 2), ("begin send-long", 3)]);
        assert!(NET[0].figure(&begun).unwrap().is_none());
    }

    #[test]
    fn a_tool_that_failed_in_the_guest_is_an_error() {
        let failed = lines(&[("begin respond-short", 1), ("respond-short = ", 2)]);
        assert!(NET[2].figure(&failed).is_err());
        let nothing = lines(&[("begin send-short", 1), ("send-short = 0", 2)]);
        assert!(NET[0].figure(&nothing).is_err());
    }
}
