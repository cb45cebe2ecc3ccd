//! Requests and responses of one byte over TCP: `rr ADDRESS` answers them, and ends never; `rr ADDRESS COUNT` asks so
//! often, one after the other, and prints the nanoseconds that one took on average.
//!
//! `xtask` has rustc compile it as it stands, for the emulated host and for its guest.

use std::error::Error;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().ok_or("there is no address")?;
    let mut byte = [0];
    let Some(count) = arguments.next() else {
        let listener = TcpListener::bind(address)?;
        loop {
            // A client that is cut off does not end the service for the next one.
            if let Err(error) = answer(listener.accept()?.0) {
                eprintln!("rr: {error}");
            }
        }
    };
    let count: u32 = count.parse()?;
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let start = Instant::now();
    for _ in 0..count {
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
    }
    println!("{}", start.elapsed().as_nanos() / u128::from(count.max(1)));
    Ok(())
}

/// Sends back what comes, until nothing more does.
fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 {
        stream.write_all(&byte)?;
    }
    Ok(())
}
