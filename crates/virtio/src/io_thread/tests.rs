//! Tests of the loop with handlers that are no devices.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use super::*;
use crate::device::GuestFault;
use crate::testing::DEADLINE;

/// What a [`Probe`] does when its eventfd is ready, by the number that was written there.
const REPORT: u64 = 1;
const FAULT: u64 = 2;
const DEAFEN: u64 = 3;
const LISTEN_FOR_ROOM: u64 = 4;

struct Probe {
    event: Arc<EventFd>,
    reports: Sender<(u32, Option<String>)>,
}

impl Handler for Probe {
    fn watch(&mut self, watch: &mut Watch<'_>) -> io::Result<()> {
        watch.add(&*self.event, 7)
    }

    fn ready(&mut self, token: u32, watch: &mut Watch<'_>) -> Result<(), GuestFault> {
        let mut result = Ok(());
        match self.event.read() {
            Ok(FAULT) => result = Err(GuestFault::new("a wild address")),
            Ok(DEAFEN) => watch.remove(&*self.event),
            Ok(LISTEN_FOR_ROOM) => watch.modify(&*self.event, EventSet::OUT, 8).unwrap(),
            _ => watch.modify(&*self.event, EventSet::IN, 7).unwrap(),
        }
        // Last, so that a test's next number is not added to this one.
        let _ = self.reports.send((token, std::thread::current().name().map(str::to_owned)));
        result
    }
}

type Reports = Receiver<(u32, Option<String>)>;

fn probe() -> (Box<Probe>, Arc<EventFd>, Reports) {
    let event = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let (reports, seen) = channel();
    (Box::new(Probe { event: event.clone(), reports }), event, seen)
}

/// Adds a handler to the thread; what it faults with comes out of the channel.
fn insert(thread: &IoThread, probe: Box<Probe>) -> (Ticket, Receiver<String>) {
    let (faults, faulted) = channel();
    let ticket = Ticket::new();
    let on_fault = move |error: &dyn fmt::Display| faults.send(error.to_string()).unwrap();
    thread.insert(probe, ticket, Some(Box::new(on_fault)));
    (ticket, faulted)
}

fn token(reports: &Reports) -> u32 {
    reports.recv_timeout(DEADLINE).unwrap().0
}

#[test]
fn a_handler_is_called_with_its_token_on_its_thread_and_comes_back() {
    let thread = IoThread::spawn(3, || ()).unwrap();
    let (probe, event, reports) = probe();
    let (ticket, _faults) = insert(&thread, probe);
    event.write(REPORT).unwrap();
    assert_eq!(reports.recv_timeout(DEADLINE).unwrap(), (7, Some("io-3".to_owned())));
    let probe: Probe = downcast(thread.remove(ticket));
    event.write(REPORT).unwrap();
    // Another handler's round trip shows that the loop has had its chance to call the first.
    let (other, other_event, other_reports) = self::probe();
    insert(&thread, other);
    other_event.write(REPORT).unwrap();
    token(&other_reports);
    assert!(reports.try_recv().is_err());
    assert!(Arc::ptr_eq(&probe.event, &event));
}

#[test]
fn a_fault_parks_one_handler_and_leaves_the_others_alone() {
    let thread = IoThread::spawn(0, || ()).unwrap();
    let (bad, bad_event, bad_reports) = probe();
    let (good, good_event, good_reports) = probe();
    let (bad, faults) = insert(&thread, bad);
    insert(&thread, good);
    bad_event.write(FAULT).unwrap();
    assert_eq!(faults.recv_timeout(DEADLINE).unwrap(), "a wild address");
    token(&bad_reports);
    bad_event.write(REPORT).unwrap();
    good_event.write(REPORT).unwrap();
    token(&good_reports);
    assert!(bad_reports.try_recv().is_err());
    thread.remove(bad);
}

#[test]
fn what_a_descriptor_is_watched_for_can_change_and_end() {
    let thread = IoThread::spawn(0, || ()).unwrap();
    let (probe, event, reports) = probe();
    let (ticket, _faults) = insert(&thread, probe);
    event.write(LISTEN_FOR_ROOM).unwrap();
    assert_eq!(token(&reports), 7);
    assert_eq!(token(&reports), 8, "an eventfd has room at once, and then it is watched for input again");
    event.write(DEAFEN).unwrap();
    assert_eq!(token(&reports), 7);
    event.write(REPORT).unwrap();
    let probe = thread.remove(ticket);
    assert!(reports.try_recv().is_err());
    thread.insert(probe, ticket, Some(Box::new(|_| ())));
    assert_eq!(token(&reports), 7, "a handler that comes back is asked again what it waits for");
}

#[test]
fn a_handler_whose_descriptor_cannot_be_watched_is_parked() {
    let thread = IoThread::spawn(0, || ()).unwrap();
    let (probe, event, _reports) = probe();
    insert(&thread, probe);
    let (reports, _seen) = channel();
    // The same eventfd twice in one loop.
    let (_, faults) = insert(&thread, Box::new(Probe { event, reports }));
    assert!(faults.recv_timeout(DEADLINE).unwrap().contains("exists"));
}

#[test]
fn the_thread_ends_with_its_last_handle_and_drops_its_handlers() {
    let thread = IoThread::spawn(0, || ()).unwrap();
    let other = thread.clone();
    let (probe, _event, reports) = probe();
    insert(&thread, probe);
    drop(thread);
    assert!(
        reports.recv_timeout(Duration::ZERO).is_err_and(|error| error == std::sync::mpsc::RecvTimeoutError::Timeout)
    );
    drop(other);
    assert_eq!(reports.try_recv(), Err(std::sync::mpsc::TryRecvError::Disconnected));
}
