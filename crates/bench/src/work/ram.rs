//! Memory: how fast it is read, written and copied, how long one access waits, and what a page costs when it is first
//! touched, on small pages and on huge ones.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::pages::Pages;
use super::{rate, say};

/// More than the caches of most processors have for one core, and little enough for a small machine.
const SIZE: usize = 32 << 20;
const PAGE: usize = 4096;
const LINE: usize = 64;

pub(super) fn all(time: Duration) -> anyhow::Result<()> {
    bandwidth(time)?;
    for (huge, suffix) in [(false, ""), (true, "-huge")] {
        say(&format!("ram-latency{suffix}"), latency(time, huge)?);
        say(&format!("ram-fault{suffix}"), fault(time, huge)?);
    }
    Ok(())
}

fn map(size: usize, huge: bool) -> anyhow::Result<Pages> {
    Pages::map(size, huge).context("no memory")
}

fn bandwidth(time: Duration) -> anyhow::Result<()> {
    let (mut one, mut other) = (map(SIZE, false)?, map(SIZE, false)?);
    let (one, other) = (one.bytes(), other.bytes());
    let megabytes = SIZE as f64 / 1e6;
    let mut value = 0;
    let mut write = || {
        value ^= 0x55;
        one.fill(black_box(value));
    };
    say("ram-write", rate(time, megabytes, &mut write));
    say("ram-copy", rate(time, megabytes, || black_box(&mut *other).copy_from_slice(black_box(one))));
    let read = || {
        let words = one.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().expect("eight bytes")));
        black_box(words.fold(0, |sum: u64, word| sum.wrapping_add(word)));
    };
    say("ram-read", rate(time, megabytes, read));
    Ok(())
}

/// Nanoseconds of an access that waits for the one before it, at places in an order that no processor foresees.
fn latency(time: Duration, huge: bool) -> anyhow::Result<f64> {
    let mut pages = map(SIZE, huge)?;
    let bytes = pages.bytes();
    // One round through all lines, each of which names the next (Sattolo's shuffle).
    let lines = u32::try_from(SIZE / LINE).context("a number of lines")?;
    let mut order: Vec<u32> = (0..lines).collect();
    let mut state = 0x9e37_79b9_u32;
    for last in (1..order.len()).rev() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        order.swap(last, ((u64::from(state) * last as u64) >> 32) as usize);
    }
    for (at, next) in order.iter().enumerate() {
        bytes[at * LINE..at * LINE + 4].copy_from_slice(&next.to_ne_bytes());
    }
    const HOPS: u32 = 10_000;
    let mut at = 0_usize;
    let hops = rate(time, f64::from(HOPS), || {
        for _ in 0..HOPS {
            let line = bytes[at * LINE..].first_chunk().expect("a line has four bytes");
            at = u32::from_ne_bytes(*line) as usize;
        }
        black_box(at);
    });
    Ok(1e9 / hops)
}

/// Nanoseconds for each 4 KiB of memory that is touched for the first time.
fn fault(time: Duration, huge: bool) -> anyhow::Result<f64> {
    let mut spent = Duration::ZERO;
    let mut touched = 0.0;
    // What is mapped and given back meanwhile is not timed.
    while spent < time {
        let mut pages = map(SIZE / 2, huge)?;
        let bytes = pages.bytes();
        let start = Instant::now();
        for at in (0..bytes.len()).step_by(PAGE) {
            bytes[at] = 1;
        }
        spent += start.elapsed();
        touched += (bytes.len() / PAGE) as f64;
        black_box(bytes);
    }
    Ok(spent.as_secs_f64() * 1e9 / touched)
}
