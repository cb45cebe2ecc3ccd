//! Published TCP ports: what comes to one goes on to a healthy machine, each connection to the next one, and to another
//! where that does not answer.
//!
//! It listens inside of the fleet's network, where pasta brings what comes to the host's port. nftables could lead it on
//! by itself (and does, for UDP), but pasta 2023-03 ends a connection that is not there at once, and a rule cannot try
//! another machine.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use fleet::plan::Machine;
use fleet::rules::View;

/// How long a machine has to take a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Connections at a time; the next one is refused.
const MOST: usize = 1000;

/// The ports, and where each leads now: the loop writes it, the ports' threads read it.
#[derive(Default)]
pub(crate) struct Published {
    ports: BTreeMap<u16, Arc<Port>>,
}

#[derive(Default)]
struct Port {
    targets: Mutex<Vec<SocketAddr>>,
    /// Whose turn it is.
    next: AtomicUsize,
    connections: AtomicUsize,
}

impl Published {
    /// Leads the ports to where the view has them. One that nobody publishes any more leads nowhere.
    pub(crate) fn update(&mut self, view: &View<'_>) -> anyhow::Result<()> {
        let mut wanted: BTreeMap<u16, Vec<SocketAddr>> = BTreeMap::new();
        for (name, service) in view.services {
            for publish in service.publish.iter().filter(|publish| !publish.udp) {
                let healthy = |(machine, healthy): &&(&Machine, bool)| *healthy && machine.service == *name;
                let target = |(machine, _): &(&Machine, bool)| {
                    SocketAddr::V4(SocketAddrV4::new(machine.address(view.subnet), publish.guest))
                };
                wanted.insert(publish.host, view.machines.iter().filter(healthy).map(target).collect());
            }
        }
        for (number, port) in &self.ports {
            *port.lock() = wanted.remove(number).unwrap_or_default();
        }
        for (number, targets) in wanted {
            let port = Arc::new(Port { targets: Mutex::new(targets), ..Port::default() });
            port.clone().listen(number)?;
            self.ports.insert(number, port);
        }
        Ok(())
    }
}

impl Port {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<SocketAddr>> {
        self.targets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listen(self: Arc<Self>, number: u16) -> anyhow::Result<()> {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, number))
            .with_context(|| format!("cannot listen at port {number} inside of the fleet"))?;
        let accept = move || {
            for stream in listener.incoming().filter_map(Result::ok) {
                if self.connections.fetch_add(1, Ordering::Relaxed) < MOST {
                    let port = self.clone();
                    let serve = move || {
                        port.serve(&stream);
                        port.connections.fetch_sub(1, Ordering::Relaxed);
                    };
                    if thread::Builder::new().name("connection".into()).spawn(serve).is_ok() {
                        continue;
                    }
                }
                self.connections.fetch_sub(1, Ordering::Relaxed);
            }
        };
        thread::Builder::new().name("port".into()).spawn(accept).context("cannot start a thread")?;
        Ok(())
    }

    fn serve(&self, client: &TcpStream) {
        let Some(machine) = self.connect() else { return };
        thread::scope(|scope| {
            let back = thread::Builder::new().name("back".into()).spawn_scoped(scope, || pass(&machine, client));
            if back.is_ok() {
                pass(client, &machine);
            }
        });
    }

    /// A connection to the machine whose turn it is, or to the next one that takes it.
    fn connect(&self) -> Option<TcpStream> {
        let targets = self.lock().clone();
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let all = (0..targets.len()).map(|step| targets[turn.wrapping_add(step) % targets.len()]);
        all.into_iter().find_map(|target| TcpStream::connect_timeout(&target, CONNECT).ok())
    }
}

/// Passes on what one says, and its end.
fn pass(mut from: &TcpStream, mut to: &TcpStream) {
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;

    #[test]
    fn a_connection_goes_to_the_next_machine_where_one_does_not_answer() {
        let there = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let gone = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let targets = Mutex::new(vec![gone, there.local_addr().unwrap()]);
        let port = Port { targets, ..Port::default() };
        for _ in 0..2 {
            assert_eq!(port.connect().unwrap().peer_addr().unwrap(), there.local_addr().unwrap());
        }
        port.lock().clear();
        assert!(port.connect().is_none());
    }

    #[test]
    fn what_is_said_is_passed_on_both_ways_with_its_end() {
        let service = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let front = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = Port { targets: Mutex::new(vec![service.local_addr().unwrap()]), ..Port::default() };
        let mut client = TcpStream::connect(front.local_addr().unwrap()).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| port.serve(&front.accept().unwrap().0));
            scope.spawn(|| {
                let (mut stream, _) = service.accept().unwrap();
                let mut heard = String::new();
                stream.read_to_string(&mut heard).unwrap();
                stream.write_all(format!("heard {heard}").as_bytes()).unwrap();
            });
            client.write_all(b"hello").unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert_eq!(answer, "heard hello");
        });
    }
}
