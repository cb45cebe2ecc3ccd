//! The keys that the monitor takes for itself at a terminal. Ctrl-A is the first of two:
//!
//! - `x` ends the VM,
//! - `?` or `h` prints a help text,
//! - Ctrl-A sends one Ctrl-A to the guest,
//! - any other key goes to the guest together with the Ctrl-A before it.

/// The byte that a terminal sends for Ctrl-A.
const CTRL_A: u8 = 1;

/// What Ctrl-A `?` prints.
pub(super) const HELP: &str = "\r\nvmm: Ctrl-A x ends the VM, Ctrl-A ? prints this, Ctrl-A Ctrl-A sends Ctrl-A\r\n";

/// What the monitor is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Quit,
    Help,
}

/// Finds the escapes in what is typed, however reads cut it up.
#[derive(Default)]
pub(super) struct Escape {
    /// The last key was a Ctrl-A, which is held back.
    armed: bool,
}

impl Escape {
    /// Appends to `guest` what the guest gets of `typed`. Stops behind the first command, and returns it with what
    /// is left.
    pub(super) fn filter<'a>(&mut self, typed: &'a [u8], guest: &mut Vec<u8>) -> Option<(Command, &'a [u8])> {
        for (at, &key) in typed.iter().enumerate() {
            if !std::mem::take(&mut self.armed) {
                self.armed = key == CTRL_A;
                guest.extend((key != CTRL_A).then_some(key));
                continue;
            }
            match key {
                b'x' => return Some((Command::Quit, &typed[at + 1..])),
                b'?' | b'h' => return Some((Command::Help, &typed[at + 1..])),
                CTRL_A => guest.push(CTRL_A),
                _ => guest.extend([CTRL_A, key]),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Types `pieces`, one read each.
    fn run(pieces: &[&[u8]]) -> (Vec<u8>, Vec<Command>) {
        let (mut escape, mut guest, mut commands) = (Escape::default(), Vec::new(), Vec::new());
        for piece in pieces {
            let mut rest = *piece;
            while let Some((command, left)) = escape.filter(rest, &mut guest) {
                commands.push(command);
                rest = left;
            }
        }
        (guest, commands)
    }

    #[test]
    fn each_escape_does_what_the_help_says() {
        let (guest, commands) = run(&[b"ab\x01xc\x01?d\x01he\x01\x01f"]);
        assert_eq!(guest, b"abcde\x01f");
        assert_eq!(commands, [Command::Quit, Command::Help, Command::Help]);
    }

    #[test]
    fn an_escape_is_found_however_reads_cut_it_up() {
        let typed = b"ab\x01xc\x01?d\x01\x01e\x01lf";
        let whole = run(&[typed]);
        let single: Vec<&[u8]> = typed.chunks(1).collect();
        assert_eq!(run(&single), whole);
        assert_eq!(whole.0, b"abcd\x01e\x01lf");
    }

    #[test]
    fn an_unknown_key_reaches_the_guest_with_its_ctrl_a() {
        assert_eq!(run(&[b"\x01", b"l"]), (b"\x01l".to_vec(), vec![]));
    }
}
