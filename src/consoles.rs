//! The consoles of the guest as the main loop sees them: the serial port's, and the virtio console's where there is one.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use devices::console::{Console, GuestSide, SerialSpec, VirtioConsole, stop_this_process};
use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use machine::VmConfig;

use crate::exit::Usage;

/// The main thread's event loop.
pub(crate) type EventLoop = EventManager<Rc<RefCell<dyn MutEventSubscriber>>>;

/// What outlives a machine, and the next one after a reboot.
pub(crate) struct Consoles {
    pub(crate) serial: Rc<RefCell<Console>>,
    pub(crate) virtio: Option<Rc<RefCell<VirtioConsole>>>,
    /// They are part of the loop, and the terminal is raw, only once a machine has been built.
    claimed: bool,
}

impl Consoles {
    /// Opens those that are asked for, and says where to find them. `quit` runs when the user types Ctrl-A x.
    pub(crate) fn open(config: &VmConfig, quit: impl Fn() + Clone + Send + 'static) -> anyhow::Result<Self> {
        let (serial, virtio) = config.consoles()?;
        let serial = Console::open(&serial, Box::new(quit.clone()));
        let serial = opened("serial", serial)?;
        let virtio = match virtio {
            SerialSpec::Off => None,
            spec => Some(opened("virtio", Console::open_hvc(&spec, Box::new(quit)))?),
        };
        Ok(Self { serial, virtio, claimed: false })
    }

    /// Makes them part of the loop, once.
    pub(crate) fn claim(&mut self, events: &mut EventLoop) {
        if std::mem::replace(&mut self.claimed, true) {
            return;
        }
        events.add_subscriber(self.serial.clone());
        if let Some(virtio) = &self.virtio {
            events.add_subscriber(virtio.clone());
        }
    }

    /// For SIGTSTP: gives the terminal back, and stops this process until SIGCONT.
    pub(crate) fn suspend(&self) {
        self.serial.borrow_mut().release();
        if let Some(virtio) = &self.virtio {
            virtio.borrow_mut().release();
        }
        stop_this_process();
    }

    /// For SIGCONT: takes the terminal again, which may have another size by now.
    pub(crate) fn resume(&self) {
        self.serial.borrow_mut().resume();
        if let Some(virtio) = &self.virtio {
            virtio.borrow_mut().resume();
        }
        self.resize();
    }

    /// For SIGWINCH: tells the guest the terminal's size, which a serial port has no way to.
    pub(crate) fn resize(&self) {
        if let Some(virtio) = &self.virtio {
            virtio.borrow().resize();
        }
    }

    /// Writes what is left of the guest's output, and waits for each reader no longer than `limit`.
    pub(crate) fn drain(&self, limit: Duration) {
        self.serial.borrow_mut().drain(limit);
        if let Some(virtio) = &self.virtio {
            virtio.borrow_mut().drain(limit);
        }
    }
}

/// A console that could be opened; a mistake of the user's, with the console's name, otherwise.
fn opened<P: GuestSide>(name: &str, console: anyhow::Result<Console<P>>) -> Result<Rc<RefCell<Console<P>>>, Usage> {
    let console = console.map_err(|error| Usage(format!("the {name} console cannot be had: {error:#}")))?;
    if let Some(place) = console.describe() {
        eprintln!("vmm: the {name} console is {place}");
    }
    Ok(Rc::new(RefCell::new(console)))
}
