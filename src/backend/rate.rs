//! Rate limits: how much of a device a guest may use in a second.
//!
//! A token bucket. Tokens (bytes, or operations) drip into a bucket at a constant rate until it is full; each operation
//! takes its cost out. A bucket here holds what drips in during one second, so a guest that was idle may use one
//! second's worth at once and from then on gets the rate. An operation that costs more than a whole bucket starts when
//! the bucket is full and leaves it in debt, which the next one waits for: the average holds for operations of any
//! size.
//!
//! This is arithmetic only. Time is passed in, as the time since any fixed moment, and the caller owns the timer.

use std::num::NonZeroU64;
use std::time::Duration;

const NANOS: i128 = 1_000_000_000;

/// How much a guest may use, on average.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes a second.
    pub bandwidth: Option<NonZeroU64>,
    /// Operations a second.
    pub operations: Option<NonZeroU64>,
}

impl Limits {
    /// Whether nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        self.bandwidth.is_none() && self.operations.is_none()
    }
}

/// One kind of token.
#[derive(Clone, Debug)]
struct Bucket {
    /// Tokens a second, which is also what the bucket holds.
    rate: i128,
    /// Billionths of a token; below zero is debt.
    level: i128,
}

impl Bucket {
    fn full(rate: NonZeroU64) -> Bucket {
        let rate = i128::from(rate.get());
        Bucket {
            rate,
            level: rate.saturating_mul(NANOS),
        }
    }

    /// A token a second is a billionth of a token a nanosecond.
    fn fill(&mut self, elapsed: Duration) {
        let nanos = i128::try_from(elapsed.as_nanos()).unwrap_or(i128::MAX);
        let capacity = self.rate.saturating_mul(NANOS);
        self.level = self
            .level
            .saturating_add(self.rate.saturating_mul(nanos))
            .min(capacity);
    }

    /// How long until an operation of this cost may start.
    fn wait(&self, cost: u64) -> Duration {
        let needed = i128::from(cost).min(self.rate).saturating_mul(NANOS);
        let missing = needed.saturating_sub(self.level).max(0);
        // Rounded up, so that the wait is never short. The rate is not zero.
        let nanos = missing
            .saturating_add(self.rate.saturating_sub(1))
            .checked_div(self.rate)
            .unwrap_or(0);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn take(&mut self, cost: u64) {
        self.level = self
            .level
            .saturating_sub(i128::from(cost).saturating_mul(NANOS));
    }
}

/// The buckets of one device.
#[derive(Clone, Debug)]
pub struct Limiter {
    bandwidth: Option<Bucket>,
    operations: Option<Bucket>,
    /// When the buckets were filled last.
    filled: Duration,
}

impl Limiter {
    /// Full buckets, as of `now`.
    pub fn new(limits: Limits, now: Duration) -> Limiter {
        Limiter {
            bandwidth: limits.bandwidth.map(Bucket::full),
            operations: limits.operations.map(Bucket::full),
            filled: now,
        }
    }

    /// Takes the tokens of one operation that moves `bytes` bytes. `now` that is earlier than before counts as before.
    ///
    /// # Errors
    /// How long to wait before asking again, and never zero. Nothing has been taken then.
    pub fn take(&mut self, bytes: u64, now: Duration) -> Result<(), Duration> {
        self.wait(bytes, now)?;
        self.charge(bytes);
        Ok(())
    }

    /// Fills the buckets, and says how long an operation has to wait.
    fn wait(&mut self, bytes: u64, now: Duration) -> Result<(), Duration> {
        let elapsed = now.saturating_sub(self.filled);
        self.filled = self.filled.max(now);
        let mut wait = Duration::ZERO;
        for (bucket, cost) in [(&mut self.bandwidth, bytes), (&mut self.operations, 1)] {
            if let Some(bucket) = bucket {
                bucket.fill(elapsed);
                wait = wait.max(bucket.wait(cost));
            }
        }
        if wait.is_zero() { Ok(()) } else { Err(wait) }
    }

    /// Whether something may start whose size is not known yet: no bucket is in debt, and there is a token for an
    /// operation. What it turns out to cost is told by [`Limiter::charge`].
    ///
    /// # Errors
    /// How long to wait before asking again, and never zero.
    pub fn open(&mut self, now: Duration) -> Result<(), Duration> {
        self.wait(0, now)
    }

    /// Takes the tokens of an operation that has moved `bytes` bytes, on credit if need be.
    pub fn charge(&mut self, bytes: u64) {
        for (bucket, cost) in [(&mut self.bandwidth, bytes), (&mut self.operations, 1)] {
            if let Some(bucket) = bucket {
                bucket.take(cost);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// Bytes, time in milliseconds, and how many milliseconds it has to wait (0: it may start).
    type Step = (u64, u64, u64);

    #[test]
    fn buckets_hold_a_second_refill_at_the_rate_and_may_go_into_debt() {
        let cases: &[(&str, u64, u64, &[Step])] = &[
            (
                "a full bucket is a second's worth, and then comes the rate",
                1000,
                0,
                &[
                    (600, 0, 0),
                    (400, 0, 0),
                    (100, 0, 100),
                    (100, 100, 0),
                    (1, 100, 1),
                ],
            ),
            (
                "idle time beyond a second is not saved up",
                1000,
                0,
                &[(1000, 0, 0), (1000, 60_000, 0), (500, 60_000, 500)],
            ),
            (
                "an operation larger than the bucket starts when it is full and pays afterwards",
                1000,
                0,
                &[(5000, 0, 0), (1, 0, 4001), (1, 4000, 1), (1, 4001, 0)],
            ),
            (
                "a large operation waits for a full bucket, no longer",
                1000,
                0,
                &[(500, 0, 0), (5000, 0, 500), (5000, 500, 0)],
            ),
            (
                "operations are counted whatever their size",
                0,
                2,
                &[
                    (0, 0, 0),
                    (1 << 40, 0, 0),
                    (0, 0, 500),
                    (0, 500, 0),
                    (0, 600, 400),
                ],
            ),
            (
                "the slower bucket decides, and a refusal takes from neither",
                1000,
                2,
                &[
                    (0, 0, 0),
                    (0, 0, 0),
                    (1000, 0, 500),
                    (1000, 500, 0),
                    (0, 500, 500),
                ],
            ),
            (
                "a clock that goes back stands still",
                1000,
                0,
                &[
                    (1000, 500, 0),
                    (100, 0, 100),
                    (100, 500, 100),
                    (100, 600, 0),
                ],
            ),
            (
                "no limit never waits",
                0,
                0,
                &[(u64::MAX, 0, 0), (u64::MAX, 0, 0)],
            ),
        ];
        for (what, bandwidth, operations, steps) in cases {
            let limits = Limits {
                bandwidth: NonZeroU64::new(*bandwidth),
                operations: NonZeroU64::new(*operations),
            };
            let mut limiter = Limiter::new(limits, Duration::ZERO);
            for (index, (bytes, at, wait)) in steps.iter().enumerate() {
                let expected = if *wait == 0 { Ok(()) } else { Err(ms(*wait)) };
                assert_eq!(
                    limiter.take(*bytes, ms(*at)),
                    expected,
                    "{what}, step {index}"
                );
            }
        }
    }

    #[test]
    fn what_was_taken_on_credit_is_waited_for_afterwards() {
        let limits = Limits {
            bandwidth: NonZeroU64::new(1000),
            operations: NonZeroU64::new(2),
        };
        let mut limiter = Limiter::new(limits, Duration::ZERO);
        assert_eq!(limiter.open(Duration::ZERO), Ok(()));
        assert_eq!(limiter.open(Duration::ZERO), Ok(()), "asking is free");
        limiter.charge(3000);
        assert_eq!(limiter.open(Duration::ZERO), Err(ms(2000)));
        assert_eq!(limiter.open(ms(1999)), Err(ms(1)));
        assert_eq!(limiter.open(ms(2000)), Ok(()));
        limiter.charge(0);
        limiter.charge(0);
        assert_eq!(limiter.open(ms(2000)), Err(ms(500)), "no operation left");
    }

    #[test]
    fn whoever_waits_as_long_as_told_may_start() {
        let mut limiter = Limiter::new(
            Limits {
                bandwidth: NonZeroU64::new(333_333_333),
                operations: NonZeroU64::new(7),
            },
            Duration::ZERO,
        );
        let mut now = Duration::ZERO;
        for bytes in (0..200).map(|n| n * 7_777_777) {
            if let Err(wait) = limiter.take(bytes, now) {
                now += wait;
                assert_eq!(limiter.take(bytes, now), Ok(()), "{bytes} bytes");
            }
        }
    }

    #[test]
    fn extreme_rates_and_times_do_not_overflow() {
        let limits = Limits {
            bandwidth: NonZeroU64::new(u64::MAX),
            operations: NonZeroU64::new(1),
        };
        let mut limiter = Limiter::new(limits, Duration::ZERO);
        assert_eq!(limiter.take(u64::MAX, Duration::ZERO), Ok(()));
        assert_eq!(limiter.take(u64::MAX, Duration::ZERO), Err(ms(1000)));
        assert_eq!(limiter.take(u64::MAX, Duration::MAX), Ok(()));
    }
}
