//! The processor: integers, floating point, a hash, compression. Nothing here makes a system call while it is timed, so
//! in a machine it shows what the hypervisor takes, and nothing of the kernel.

use std::hint::black_box;
use std::io::Write as _;
use std::time::{Duration, Instant};

use flate2::Compression;
use flate2::write::DeflateEncoder;
use sha2::{Digest as _, Sha256};

use super::{rate, say};

/// Steps of arithmetic in one go.
const STEPS: u32 = 100_000;

pub(super) fn all(time: Duration) -> anyhow::Result<()> {
    say("cpu-integer", integer(time));
    let fall = || {
        black_box(float());
    };
    say("cpu-float", rate(time, f64::from(STEPS) / 1e6, fall));
    let text = text();
    let megabytes = text.len() as f64 / 1e6;
    let hash = || {
        black_box(Sha256::digest(black_box(&text)));
    };
    say("cpu-sha256", rate(time, megabytes, hash));
    let mut compress = || {
        let mut encoder = DeflateEncoder::new(Vec::with_capacity(text.len()), Compression::default());
        encoder.write_all(black_box(&text)).expect("a vector takes every write");
        drop(black_box(encoder.finish()));
    };
    say("cpu-compress", rate(time, megabytes, &mut compress));
    Ok(())
}

/// Waits until this processor does as much in one moment as in the next: what a start leaves to be done, such as the end
/// of another container, is not to be taken for the price of a measure.
pub(super) fn settle(time: Duration) {
    let start = Instant::now();
    let mut before = integer(time / 2);
    let mut calm = 0;
    while calm < 2 && start.elapsed() < 10 * time {
        let now = integer(time / 2);
        calm = if (now - before).abs() <= before / 20.0 { calm + 1 } else { 0 };
        before = now;
    }
}

/// The measure by which the machine's noise is told: always the same work.
pub(super) fn noise(time: Duration) -> anyhow::Result<()> {
    say("noise", integer(time));
    Ok(())
}

/// Million steps a second of a generator whose steps wait for each other.
fn integer(time: Duration) -> f64 {
    let mut state = 88_172_645_463_325_252_u64;
    rate(time, f64::from(STEPS) / 1e6, || {
        for _ in 0..STEPS {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state = state.wrapping_mul(2_685_821_657_736_338_717);
        }
        black_box(state);
    })
}

/// A body that falls round another.
fn float() -> [f64; 4] {
    let [mut x, mut y, mut u, mut v] = black_box([1.0_f64, 0.0, 0.0, 1.0]);
    for _ in 0..STEPS {
        let distance = x.mul_add(x, y * y);
        let pull = 1e-4 / (distance * distance.sqrt());
        u -= x * pull;
        v -= y * pull;
        x += u * 1e-4;
        y += v * 1e-4;
    }
    [x, y, u, v]
}

/// What compresses about as well as text does.
fn text() -> Vec<u8> {
    const WORDS: [&str; 8] = ["guest ", "host ", "page ", "queue ", "thread ", "clock ", "disk ", "kernel\n"];
    let mut state = 1_u32;
    let mut text = Vec::with_capacity(64 << 10);
    while text.len() < 60 << 10 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        text.extend_from_slice(WORDS[(state >> 29) as usize].as_bytes());
        text.extend_from_slice(format!("{:x} ", state >> 20).as_bytes());
    }
    text
}
