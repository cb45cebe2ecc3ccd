//! The network: a stream each way, one byte there and back, new connections. The other side is the workload, too.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use super::{Settings, interface, is_init, say, tools};
use crate::netns::{INSIDE, OUTSIDE, PORT};

/// What a connection is for, told by its first byte.
const ECHO: u8 = b'e';
const DISCARD: u8 = b'd';
const SEND: u8 = b's';
const GREET: u8 = b'g';

/// One write of a stream.
const LARGE: usize = 64 << 10;
/// Nothing takes as long.
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) fn all(settings: &Settings) -> anyhow::Result<()> {
    prepare()?;
    let time = settings.time;
    if settings.has_tools {
        say("network-out", tools::iperf3(OUTSIDE, time, false)?);
        say("network-in", tools::iperf3(OUTSIDE, time, true)?);
    } else {
        say("network-out", send(time)?);
        say("network-in", receive(time)?);
    }
    round_trips(time)?;
    connections(time)
}

/// Has the address that the other side knows.
pub(super) fn prepare() -> anyhow::Result<()> {
    if is_init() {
        interface::set_up(INSIDE).context("cannot set up the network card")?;
    }
    // The first packets wait until bridges and caches of addresses have learnt.
    let start = Instant::now();
    while connect(GREET).is_err() {
        ensure!(start.elapsed() < PATIENCE, "nobody answers at {OUTSIDE}");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn connect(what: u8) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((OUTSIDE, PORT)), PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&[what])?;
    if what == GREET {
        stream.read_exact(&mut [0])?;
    }
    Ok(stream)
}

/// Mbit/s out of here.
fn send(time: Duration) -> anyhow::Result<f64> {
    let mut stream = connect(DISCARD).context("cannot connect")?;
    let buffer = vec![0x5a; LARGE];
    let start = Instant::now();
    let mut sent = 0.0;
    while start.elapsed() < time {
        stream.write_all(&buffer).context("the stream broke")?;
        sent += LARGE as f64;
    }
    // What is in buffers has not been sent: the other side says when it has all.
    stream.shutdown(Shutdown::Write).context("the stream broke")?;
    stream.read_exact(&mut [0]).context("the stream broke")?;
    Ok(sent * 8.0 / 1e6 / start.elapsed().as_secs_f64())
}

/// Mbit/s into here.
fn receive(time: Duration) -> anyhow::Result<f64> {
    let mut stream = connect(SEND).context("cannot connect")?;
    let mut buffer = vec![0; LARGE];
    let start = Instant::now();
    let mut received = 0.0;
    while start.elapsed() < time {
        let count = stream.read(&mut buffer).context("the stream broke")?;
        ensure!(count > 0, "the stream ended");
        received += count as f64;
    }
    Ok(received * 8.0 / 1e6 / start.elapsed().as_secs_f64())
}

fn round_trips(time: Duration) -> anyhow::Result<()> {
    let mut stream = connect(ECHO).context("cannot connect")?;
    let mut byte = [0];
    let mut times = Vec::new();
    let start = Instant::now();
    while start.elapsed() < time || times.len() < 100 {
        let sent = Instant::now();
        stream.write_all(&byte).context("the stream broke")?;
        stream.read_exact(&mut byte).context("the stream broke")?;
        times.push(sent.elapsed());
    }
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() * percent / 100).min(times.len() - 1)].as_secs_f64() * 1e6;
    say("network-rtt-50", at(50));
    say("network-rtt-99", at(99));
    Ok(())
}

fn connections(time: Duration) -> anyhow::Result<()> {
    let start = Instant::now();
    let mut made = 0.0;
    while start.elapsed() < time {
        connect(GREET).context("cannot connect")?;
        made += 1.0;
    }
    say("network-connect", made / start.elapsed().as_secs_f64());
    Ok(())
}

/// Serves all that the measures ask for, until it is killed.
pub(super) fn serve() -> anyhow::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).context("cannot listen")?;
    say("listening", 1);
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context("cannot accept"),
        };
        // One that is cut off is no trouble for the next one.
        thread::spawn(move || answer(stream));
    }
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = vec![0x5a; LARGE];
    let mut what = [0];
    stream.read_exact(&mut what)?;
    match what[0] {
        ECHO => while echo(&mut stream, &mut buffer)? {},
        DISCARD => {
            while stream.read(&mut buffer)? > 0 {}
            stream.write_all(&[0])?;
        }
        SEND => loop {
            stream.write_all(&buffer)?;
        },
        _ => stream.write_all(&[0])?,
    }
    Ok(())
}

fn echo(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<bool> {
    let count = stream.read(buffer)?;
    stream.write_all(&buffer[..count])?;
    Ok(count > 0)
}
