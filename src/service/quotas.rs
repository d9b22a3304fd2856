//! What tenants use and how much they may: requests, executions, CPU time of a day. What sessions hold is counted where sessions are.
//!
//! The CPU time is what guests tell, who run with the code's own uid: it is held to be no more than the session could have used, and nothing keeps code that has taken
//! over its guest from telling less.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::Error;
use super::keys::MAX_KEYS;
use crate::domain::quota::{Exceeded, Quota, QuotaTable, Rate};
use crate::store::state::{State, UsageRecord};

const DAY: i64 = 24 * 3600;
/// What was used is known on its day and on so many after it, in case the clock is set back.
const KEPT_DAYS: i64 = 1;
/// Accounts of tenants that are known at once: there are no more tenants than keys, but keys come and go.
const MAX_ACCOUNTS: usize = 2 * MAX_KEYS;
/// What holds nothing any more is forgotten so often.
const FORGET: Duration = Duration::from_secs(60);
/// Executions end all the time.
const SOON: Duration = Duration::from_secs(1);
/// When to look again for what ends when its owner wants it to.
pub(super) const LATER: Duration = Duration::from_secs(5);

/// All tenants' quotas, and what they have used of them.
#[derive(Debug, Default)]
pub struct Quotas {
    table: RwLock<QuotaTable>,
    state: Option<State>,
    accounts: Mutex<HashMap<Arc<str>, Account>>,
}

#[derive(Debug, Default)]
struct Account {
    /// Executions that run or wait.
    executions: u32,
    /// Of the day, in days since 1970.
    cpu: (i64, Duration),
    bucket: Option<Bucket>,
}

/// What is left of a rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RateState {
    /// The rate.
    pub rate: Rate,
    /// Requests that may come at once.
    pub remaining: u32,
    /// Until as many as ever may.
    pub full_in: Duration,
}

/// Requests that may come, filled up all the time.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Bucket {
    /// How many may come now.
    fn filled(&self, rate: Rate, now: Instant) -> f64 {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        (self.tokens + since * rate.per_second).min(f64::from(rate.burst))
    }

    /// Takes one. What is left, or when there is one.
    fn take(&mut self, rate: Rate, now: Instant) -> Result<RateState, Duration> {
        self.tokens = self.filled(rate, now);
        self.at = now;
        let until = |tokens: f64, wanted: f64| {
            Duration::try_from_secs_f64(((wanted - tokens) / rate.per_second).max(0.0)).unwrap_or(Duration::MAX)
        };
        if self.tokens < 1.0 {
            return Err(until(self.tokens, 1.0));
        }
        self.tokens -= 1.0;
        Ok(RateState { rate, remaining: self.tokens as u32, full_in: until(self.tokens, rate.burst.into()) })
    }
}

/// An execution that counts until this is dropped.
#[derive(Debug)]
pub(super) struct Running {
    quotas: Arc<Quotas>,
    tenant: Arc<str>,
}

impl Running {
    /// It has used so much.
    pub(super) fn used(&self, cpu: Duration, now: Timestamp) {
        let mut accounts = self.quotas.accounts();
        let account = account(&mut accounts, &self.tenant);
        let (day, before) = account.cpu_of(now);
        account.cpu = (day, before.saturating_add(cpu));
        if let Some(state) = &self.quotas.state {
            let (tenant, cpu) = (Arc::clone(&self.tenant), account.cpu.1);
            // Not awaited: it is the last of what there is to say of an execution.
            state.put_usage(UsageRecord { tenant, day, cpu });
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(account) = self.quotas.accounts().get_mut(&self.tenant) {
            account.executions = account.executions.saturating_sub(1);
        }
    }
}

/// What a tenant has used.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Used {
    pub executions: u32,
    pub cpu: Duration,
}

impl Account {
    /// The day, and what was used on it.
    fn cpu_of(&self, now: Timestamp) -> (i64, Duration) {
        let today = now.as_second().div_euclid(DAY);
        let (day, used) = self.cpu;
        // A clock that was set back does not give anything back.
        if day >= today { (day, used) } else { (today, Duration::ZERO) }
    }
}

impl Quotas {
    /// With what an earlier process has kept.
    #[must_use]
    pub fn new(table: QuotaTable, state: Option<State>, kept: Vec<UsageRecord>) -> Self {
        let account =
            |record: UsageRecord| (record.tenant, Account { cpu: (record.day, record.cpu), ..Account::default() });
        Self { table: RwLock::new(table), state, accounts: Mutex::new(kept.into_iter().map(account).collect()) }
    }

    /// A tenant's quotas.
    #[must_use]
    pub fn of(&self, tenant: &str) -> Quota {
        self.table.read().unwrap_or_else(PoisonError::into_inner).of(tenant)
    }

    /// Holds tenants to other quotas from now on.
    pub fn change(&self, table: QuotaTable) {
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = table;
    }

    /// Counts a request. Says what is left, where there is a limit.
    ///
    /// # Errors
    /// [`Error::RateLimited`].
    pub(super) fn request(&self, tenant: &Arc<str>, now: Instant) -> Result<Option<RateState>, Error> {
        let Some(rate) = self.of(tenant).requests else { return Ok(None) };
        let mut accounts = self.accounts();
        let account = account(&mut accounts, tenant);
        let bucket = account.bucket.get_or_insert(Bucket { tokens: rate.burst.into(), at: now });
        bucket.take(rate, now).map(Some).map_err(|retry_after| Error::RateLimited { rate, retry_after })
    }

    /// Whether another execution may be accepted of a tenant of whom so many bytes are stored.
    ///
    /// # Errors
    /// [`Error::OverQuota`].
    pub(super) fn check_execution(&self, tenant: &Arc<str>, stored: u64, now: Timestamp) -> Result<(), Error> {
        account(&mut self.accounts(), tenant).check(self.of(tenant), stored, now)
    }

    /// Counts an execution, if it may be accepted.
    ///
    /// # Errors
    /// [`Error::OverQuota`].
    pub(super) fn begin_execution(
        self: &Arc<Self>,
        tenant: &Arc<str>,
        stored: u64,
        now: Timestamp,
    ) -> Result<Running, Error> {
        let mut accounts = self.accounts();
        let account = account(&mut accounts, tenant);
        account.check(self.of(tenant), stored, now)?;
        account.executions += 1;
        Ok(Running { quotas: Arc::clone(self), tenant: Arc::clone(tenant) })
    }

    /// Counts one that was accepted before, whatever the quotas are now.
    pub(super) fn go_on(self: &Arc<Self>, tenant: &Arc<str>) -> Running {
        account(&mut self.accounts(), tenant).executions += 1;
        Running { quotas: Arc::clone(self), tenant: Arc::clone(tenant) }
    }

    pub(super) fn used(&self, tenant: &str, now: Timestamp) -> Used {
        let accounts = self.accounts();
        let account = accounts.get(tenant);
        Used {
            executions: account.map_or(0, |account| account.executions),
            cpu: account.map_or(Duration::ZERO, |account| account.cpu_of(now).1),
        }
    }

    /// Forgets now and then what holds nothing any more, until it is told to stop.
    pub async fn stay_within_bounds(&self, stop: CancellationToken) {
        let mut timer = tokio::time::interval(FORGET);
        timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = timer.tick() => self.forget(Timestamp::now(), Instant::now()),
            }
        }
    }

    /// Forgets accounts that say no more than none would, and what was used on days that are long over.
    fn forget(&self, now: Timestamp, at: Instant) {
        let first = now.as_second().div_euclid(DAY) - KEPT_DAYS;
        self.accounts().retain(|tenant, account| account.holds(self.of(tenant).requests, first, at));
        if let Some(state) = &self.state {
            state.forget_usage(first);
        }
    }

    fn accounts(&self) -> MutexGuard<'_, HashMap<Arc<str>, Account>> {
        // Every change is whole between its statements that can panic, of which there are none.
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A tenant's account. Where there are too many, that of a tenant in which nothing runs goes, the one that has used least.
fn account<'a>(accounts: &'a mut HashMap<Arc<str>, Account>, tenant: &Arc<str>) -> &'a mut Account {
    if accounts.len() >= MAX_ACCOUNTS && !accounts.contains_key(tenant) {
        let quiet = accounts.iter().filter(|(_, account)| account.executions == 0);
        let least = quiet.min_by_key(|(_, account)| account.cpu).map(|(tenant, _)| Arc::clone(tenant));
        least.and_then(|tenant| accounts.remove(&tenant));
    }
    accounts.entry(Arc::clone(tenant)).or_default()
}

impl Account {
    /// Whether it says more than a new one would, with this rate and of days from `first` on.
    fn holds(&self, rate: Option<Rate>, first: i64, at: Instant) -> bool {
        let (day, used) = self.cpu;
        let is_full = |(rate, bucket): (Rate, Bucket)| bucket.filled(rate, at) >= f64::from(rate.burst);
        self.executions > 0 || (day >= first && !used.is_zero()) || !rate.zip(self.bucket).is_none_or(is_full)
    }

    fn check(&self, quota: Quota, stored: u64, now: Timestamp) -> Result<(), Error> {
        let over = |name, limit, retry_after| Error::OverQuota { exceeded: Exceeded { name, limit }, retry_after };
        if let Some(limit) = quota.executions.filter(|limit| self.executions >= *limit) {
            return Err(over("executions", limit.into(), SOON));
        }
        if let Some(limit) = quota.stored_bytes.filter(|limit| stored >= *limit) {
            return Err(over("storage", limit, LATER));
        }
        let (day, used) = self.cpu_of(now);
        if let Some(limit) = quota.cpu_seconds_a_day.filter(|limit| used.as_secs() >= *limit) {
            let midnight = (day + 1).saturating_mul(DAY).saturating_sub(now.as_second());
            return Err(over("cpu_seconds_a_day", limit, Duration::from_secs(midnight.unsigned_abs())));
        }
        Ok(())
    }
}

/// The next midnight of UTC.
pub(super) fn midnight_after(now: Timestamp) -> Timestamp {
    let day = now.as_second().div_euclid(DAY);
    Timestamp::from_second((day + 1).saturating_mul(DAY)).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quotas(quota: Quota) -> Arc<Quotas> {
        let tenants = [("one".to_owned(), quota)].into();
        Arc::new(Quotas::new(QuotaTable { default: Quota::default(), tenants }, None, Vec::new()))
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_bucket_lets_so_many_pass_at_once_and_then_one_after_the_other() {
        let (rate, start) = (Rate { per_second: 2.0, burst: 3 }, Instant::now());
        let quotas = quotas(Quota { requests: Some(rate), ..Quota::default() });
        let (one, other): (Arc<str>, Arc<str>) = (Arc::from("one"), Arc::from("other"));
        let ask = |tenant, millis| quotas.request(tenant, start + Duration::from_millis(millis));
        let left = |millis| ask(&one, millis).map(|state| state.map(|state| state.remaining));
        assert_eq!([left(0), left(0), left(0)], [Ok(Some(2)), Ok(Some(1)), Ok(Some(0))]);
        let refused = ask(&one, 100).unwrap_err();
        assert_eq!(refused, Error::RateLimited { rate, retry_after: Duration::from_millis(400) });
        assert_eq!(left(500), Ok(Some(0)), "one has come in half a second");
        assert_eq!(ask(&one, 60_000).unwrap().unwrap().full_in, Duration::from_millis(500));
        assert_eq!(left(60_000), Ok(Some(1)), "never more than the burst");
        assert_eq!(ask(&other, 0), Ok(None), "who has no limit is told of none");
    }

    #[test]
    fn executions_count_until_they_end() {
        let quotas = quotas(Quota { executions: Some(2), ..Quota::default() });
        let (one, other): (Arc<str>, Arc<str>) = (Arc::from("one"), Arc::from("other"));
        let held = [quotas.begin_execution(&one, 0, at(0)).unwrap(), quotas.begin_execution(&one, 0, at(0)).unwrap()];
        let refused = quotas.begin_execution(&one, 0, at(0)).unwrap_err();
        let exceeded = Exceeded { name: "executions", limit: 2 };
        assert_eq!(refused, Error::OverQuota { exceeded, retry_after: SOON });
        assert!(quotas.begin_execution(&other, 0, at(0)).is_ok());
        drop(held);
        assert_eq!(quotas.used("one", at(0)).executions, 0);
        assert_eq!(quotas.check_execution(&one, 0, at(0)), Ok(()));
    }

    #[test]
    fn who_has_too_much_stored_runs_nothing_more() {
        let quotas = quotas(Quota { stored_bytes: Some(100), ..Quota::default() });
        let one: Arc<str> = Arc::from("one");
        assert_eq!(quotas.check_execution(&one, 99, at(0)), Ok(()));
        let exceeded = Exceeded { name: "storage", limit: 100 };
        assert_eq!(quotas.check_execution(&one, 100, at(0)), Err(Error::OverQuota { exceeded, retry_after: LATER }));
        assert_eq!(quotas.check_execution(&Arc::from("other"), 100, at(0)), Ok(()));
    }

    #[test]
    fn cpu_time_is_of_a_day() {
        let quotas = quotas(Quota { cpu_seconds_a_day: Some(10), ..Quota::default() });
        let one: Arc<str> = Arc::from("one");
        let use_up = |seconds, now| quotas.go_on(&one).used(Duration::from_secs(seconds), now);
        use_up(9, at(DAY));
        assert_eq!(quotas.check_execution(&one, 0, at(DAY + 1)), Ok(()));
        use_up(1, at(DAY + 2));
        let exceeded = Exceeded { name: "cpu_seconds_a_day", limit: 10 };
        let refused = Error::OverQuota { exceeded, retry_after: Duration::from_secs(100) };
        assert_eq!(quotas.check_execution(&one, 0, at(2 * DAY - 100)), Err(refused));
        assert_eq!(quotas.used("one", at(2 * DAY - 1)).cpu, Duration::from_secs(10));
        assert_eq!(quotas.check_execution(&one, 0, at(2 * DAY)), Ok(()), "a new day");
        assert_eq!(quotas.used("one", at(2 * DAY)), Used { executions: 0, cpu: Duration::ZERO });
        use_up(10, at(2 * DAY));
        assert!(quotas.check_execution(&one, 0, at(DAY)).is_err(), "a clock that was set back gives nothing back");
        assert_eq!(midnight_after(at(2 * DAY)), at(3 * DAY));
    }

    #[test]
    fn who_holds_nothing_is_forgotten_and_nobody_else() {
        let rate = Rate { per_second: 1.0, burst: 2 };
        let quotas = quotas(Quota { requests: Some(rate), ..Quota::default() });
        let [one, two, three, four] = ["one", "two", "three", "four"].map(Arc::<str>::from);
        let (start, day) = (Instant::now(), at(10 * DAY));
        let known = |now, millis| {
            quotas.forget(now, start + Duration::from_millis(millis));
            let mut known: Vec<_> = quotas.accounts().keys().map(ToString::to_string).collect();
            known.sort();
            known
        };
        quotas.request(&one, start).unwrap();
        let running = quotas.go_on(&two);
        quotas.go_on(&three).used(Duration::from_secs(1), day);
        quotas.check_execution(&four, 0, day).unwrap();
        assert_eq!(known(day, 500), ["one", "three", "two"], "a look leaves nothing");
        assert_eq!(known(day, 1000), ["three", "two"], "a full bucket is like none");
        drop(running);
        assert_eq!(known(at(11 * DAY), 1000), ["three"]);
        assert_eq!(known(at(12 * DAY), 1000), Vec::<String>::new());
    }

    #[test]
    fn there_are_so_many_accounts_at_once_and_who_has_used_least_goes() {
        let quotas = quotas(Quota::default());
        let tenant = |n: usize| Arc::<str>::from(format!("t{n}"));
        let _running = quotas.go_on(&tenant(0));
        for n in 1..MAX_ACCOUNTS + 10 {
            quotas.go_on(&tenant(n)).used(Duration::from_secs(if n == 7 { 1 } else { 2 }), at(0));
        }
        let accounts = quotas.accounts();
        assert_eq!(accounts.len(), MAX_ACCOUNTS);
        assert!(accounts.contains_key(&tenant(0)) && !accounts.contains_key(&tenant(7)));
    }

    #[tokio::test]
    async fn what_was_used_long_ago_is_in_no_database() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path(), None).unwrap().0;
        let quotas = Arc::new(Quotas::new(QuotaTable::default(), Some(state.clone()), Vec::new()));
        for (tenant, day) in [("one", 8), ("two", 9), ("three", 10)] {
            quotas.go_on(&Arc::from(tenant)).used(Duration::from_secs(1), at(day * DAY));
        }
        quotas.forget(at(10 * DAY), Instant::now());
        state.settle().await.unwrap();
        let left = State::open(folder.path(), None).unwrap().1;
        assert_eq!(left.usage.iter().map(|record| &*record.tenant).collect::<Vec<_>>(), ["three", "two"]);
    }

    #[test]
    fn what_was_used_before_a_restart_still_is() {
        let record = UsageRecord { tenant: Arc::from("one"), day: 1, cpu: Duration::from_secs(10) };
        let quota = Quota { cpu_seconds_a_day: Some(10), ..Quota::default() };
        let table = QuotaTable { default: quota, ..QuotaTable::default() };
        let quotas = Quotas::new(table, None, vec![record]);
        assert!(quotas.check_execution(&Arc::from("one"), 0, at(DAY)).is_err());
        assert!(quotas.check_execution(&Arc::from("two"), 0, at(DAY)).is_ok());
    }
}
