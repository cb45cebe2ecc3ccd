//! What a process has written so far, and waiting for what it is to write.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use super::PATIENCE;

/// All bytes that came out of a pipe or a terminal. A thread reads them, so that the writer never waits.
#[derive(Clone)]
pub(crate) struct Stream(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    ended: bool,
}

impl Stream {
    /// Reads `from` to its end.
    pub(crate) fn read(mut from: impl Read + Send + 'static) -> Self {
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() });
        let stream = Self(shared);
        let reader = stream.clone();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                // A terminal's end is an error.
                let count = from.read(&mut buffer).unwrap_or(0);
                let mut state = reader.lock();
                state.bytes.extend(&buffer[..count]);
                state.ended = count == 0;
                reader.0.changed.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        stream
    }

    /// Waits for `text` behind the first `from` bytes, and returns how many bytes there are up to its end.
    pub(crate) fn wait_for(&self, text: &str, from: usize) -> usize {
        self.find(text, from).unwrap_or_else(|| panic!("the output ended without {text:?}:\n{}", self.text(0)))
    }

    /// Whether `text` comes before the end.
    pub(crate) fn comes(&self, text: &str) -> bool {
        self.find(text, 0).is_some()
    }

    fn find(&self, text: &str, from: usize) -> Option<usize> {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.lock();
        loop {
            if let Some(at) = find(&state.bytes[from..], text.as_bytes()) {
                return Some(from + at + text.len());
            }
            if state.ended {
                return None;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let all = String::from_utf8_lossy(&state.bytes);
            assert!(!left.is_zero(), "waited {PATIENCE:?} in vain for {text:?}, and got:\n{all}");
            state = self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for the end, and returns everything.
    pub(crate) fn whole(&self) -> Vec<u8> {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.lock();
        while !state.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited {PATIENCE:?} in vain for the output's end");
            state = self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.bytes.clone()
    }

    /// What there is, from byte `from` on.
    pub(crate) fn text(&self, from: usize) -> String {
        String::from_utf8_lossy(&self.lock().bytes[from..]).into_owned()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn find(bytes: &[u8], part: &[u8]) -> Option<usize> {
    bytes.windows(part.len()).position(|window| window == part)
}
