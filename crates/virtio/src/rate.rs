//! Rate limits: a bucket of bytes and one of operations that fill with time.
//!
//! A request is let through while every bucket holds at least one unit, and may overdraw it: so one that is larger than the
//! bucket passes, too, and what follows waits for as much longer. The rate is kept on average.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

/// What a bucket lets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// How much fits: what passes at once after a pause. At least 1.
    pub burst: u64,
    /// How much is added a second. At least 1.
    pub per_second: u64,
}

/// Limits bytes and operations. Watch it as a descriptor: it is ready when a refused request may be tried again, and
/// [`refilled`](Self::refilled) must be called then.
pub struct RateLimiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
    timer: TimerFd,
    waiting: bool,
}

impl RateLimiter {
    /// `None` is without limit.
    ///
    /// # Errors
    ///
    /// The host has no room for a timer.
    pub fn new(bytes: Option<Limit>, operations: Option<Limit>) -> io::Result<Self> {
        let now = Instant::now();
        let bucket = |limit: Option<Limit>| limit.map(|limit| Bucket::new(limit, now));
        Ok(Self { bytes: bucket(bytes), operations: bucket(operations), timer: TimerFd::new()?, waiting: false })
    }

    /// Lets one operation of `bytes` through, or refuses it and sets the timer.
    pub fn admit(&mut self, bytes: u64) -> bool {
        if self.bytes.is_none() && self.operations.is_none() {
            return true;
        }
        if self.waiting {
            return false;
        }
        let wait = self.admit_at(Instant::now(), bytes);
        if wait.is_zero() {
            return true;
        }
        // Without its timer a limiter cannot refuse: nobody would try again.
        self.waiting = self.timer.reset(wait, None).is_ok();
        !self.waiting
    }

    /// To call when the descriptor is ready; at any other time it does nothing.
    pub fn refilled(&mut self) {
        // While the timer runs, reading it would block.
        if self.waiting && !self.timer.is_armed().unwrap_or(false) {
            let _ = self.timer.wait();
            self.waiting = false;
        }
    }

    /// How long the operation has to wait; zero if it has been taken into account.
    fn admit_at(&mut self, now: Instant, bytes: u64) -> Duration {
        let wait = |bucket: &mut Option<Bucket>| bucket.as_mut().map_or(Duration::ZERO, |bucket| bucket.wait(now));
        let wait = wait(&mut self.bytes).max(wait(&mut self.operations));
        if wait.is_zero() {
            for (bucket, amount) in [(&mut self.bytes, bytes), (&mut self.operations, 1)] {
                if let Some(bucket) = bucket {
                    bucket.level -= i128::from(amount) * NANOS;
                }
            }
        }
        wait
    }
}

impl AsRawFd for RateLimiter {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

const NANOS: i128 = 1_000_000_000;

/// Levels are counted in billionths, so that no nanosecond's share is lost to rounding; no sum of these can overflow:
/// 64 bits of amount times 30 bits, less than one 64-bit amount of debt.
struct Bucket {
    limit: Limit,
    level: i128,
    filled: Instant,
}

impl Bucket {
    fn new(limit: Limit, now: Instant) -> Self {
        let limit = Limit { burst: limit.burst.max(1), per_second: limit.per_second.max(1) };
        Self { limit, level: i128::from(limit.burst) * NANOS, filled: now }
    }

    /// Fills the bucket for the time that has passed. How long it takes until a whole unit is in it; zero if one is.
    fn wait(&mut self, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.filled);
        self.filled = now;
        let passed = i128::try_from(passed.as_nanos()).unwrap_or(i128::MAX);
        let rate = i128::from(self.limit.per_second);
        let full = i128::from(self.limit.burst) * NANOS;
        self.level = self.level.saturating_add(passed.saturating_mul(rate)).min(full);
        if self.level >= NANOS {
            return Duration::ZERO;
        }
        let nanos = (NANOS - self.level + rate - 1) / rate;
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

    const SECOND: Duration = Duration::from_secs(1);

    fn limiter(bytes: Option<Limit>, operations: Option<Limit>) -> (RateLimiter, Instant) {
        let limiter = RateLimiter::new(bytes, operations).unwrap();
        let now = limiter.bytes.as_ref().or(limiter.operations.as_ref()).map(|bucket| bucket.filled);
        (limiter, now.unwrap_or_else(Instant::now))
    }

    #[test]
    fn a_burst_passes_at_once_and_then_the_rate_holds() {
        let (mut limiter, now) = limiter(None, Some(Limit { burst: 3, per_second: 10 }));
        for _ in 0..3 {
            assert_eq!(limiter.admit_at(now, 1 << 40), Duration::ZERO);
        }
        assert_eq!(limiter.admit_at(now, 0), SECOND / 10);
        assert_eq!(limiter.admit_at(now + SECOND / 10, 0), Duration::ZERO);
        assert_eq!(limiter.admit_at(now + SECOND / 10, 0), SECOND / 10);
    }

    #[test]
    fn a_request_larger_than_the_bucket_passes_and_is_paid_for_afterwards() {
        let (mut limiter, now) = limiter(Some(Limit { burst: 100, per_second: 100 }), None);
        assert_eq!(limiter.admit_at(now, 1100), Duration::ZERO);
        assert_eq!(limiter.admit_at(now, 1), SECOND * 1001 / 100);
        assert_eq!(limiter.admit_at(now + SECOND * 1001 / 100, 1), Duration::ZERO);
    }

    #[test]
    fn both_buckets_must_hold_a_unit() {
        let limit = Limit { burst: 1, per_second: 1 };
        let (mut limiter, now) = limiter(Some(Limit { burst: 1 << 30, per_second: 1 }), Some(limit));
        assert_eq!(limiter.admit_at(now, 1), Duration::ZERO);
        assert_eq!(limiter.admit_at(now, 1), SECOND);
    }

    #[test]
    fn a_pause_fills_no_more_than_the_burst() {
        let (mut limiter, now) = limiter(Some(Limit { burst: 10, per_second: 10 }), None);
        let later = now + SECOND * 3600;
        assert_eq!(limiter.admit_at(later, 10), Duration::ZERO);
        assert!(!limiter.admit_at(later, 1).is_zero());
    }

    #[test]
    fn limits_at_the_end_of_their_range_do_not_overflow() {
        let most = Limit { burst: u64::MAX, per_second: u64::MAX };
        let (mut limiter, now) = limiter(Some(most), Some(Limit { burst: 0, per_second: 0 }));
        assert_eq!(limiter.admit_at(now, u64::MAX), Duration::ZERO);
        assert_eq!(limiter.admit_at(now + SECOND * 3_000_000, u64::MAX), Duration::ZERO);
        assert_eq!(limiter.admit_at(now + SECOND * 3_000_000, u64::MAX), SECOND);
    }

    #[test]
    fn a_refused_request_is_let_through_when_the_descriptor_is_ready() {
        let mut limiter = RateLimiter::new(None, Some(Limit { burst: 1, per_second: 1 })).unwrap();
        assert!(limiter.admit(0));
        assert!(!limiter.admit(0));
        limiter.refilled();
        assert!(!limiter.admit(0), "its time has not come");
        let epoll = Epoll::new().unwrap();
        epoll.ctl(ControlOperation::Add, limiter.as_raw_fd(), EpollEvent::new(EventSet::IN, 0)).unwrap();
        assert_eq!(epoll.wait(10_000, &mut [EpollEvent::default()]).unwrap(), 1);
        limiter.refilled();
        assert!(limiter.admit(0));
    }

    #[test]
    fn without_limits_everything_passes() {
        let mut limiter = RateLimiter::new(None, None).unwrap();
        assert!((0..1000).all(|_| limiter.admit(u64::MAX)));
    }
}
