//! What a caller says of the trace that its request belongs to: the headers `traceparent` and `tracestate` of W3C Trace Context. What is not valid is as if it
//! were not there.

use opentelemetry::trace::{SpanContext, TraceState};
use opentelemetry::{SpanId, TraceFlags, TraceId};

/// The length of a `traceparent` of version 00; later versions may add to it.
const LENGTH: usize = 55;
/// Longest `traceparent`, and longest `tracestate`, that are read, in bytes. The standard wants 512 of the latter to be carried at least.
const MOST: usize = 512;

/// The caller's span, if both headers leave no doubt of it.
pub(super) fn read(traceparent: &str, tracestate: Option<&str>) -> Option<SpanContext> {
    let (head, rest) = traceparent.split_at_checked(LENGTH)?;
    let parts: Vec<&str> = head.split('-').collect();
    let [version, trace, span, flags] = parts[..] else { return None };
    let is_hex = |text: &str| text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let is_well_formed =
        [version, trace, span, flags].map(str::len) == [2, 32, 16, 2] && parts.iter().all(|p| is_hex(p));
    let may_go_on = if version == "00" { rest.is_empty() } else { rest.is_empty() || rest.starts_with('-') };
    if !is_well_formed || version == "ff" || !may_go_on || traceparent.len() > MOST {
        return None;
    }
    let (trace, span) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?) & TraceFlags::SAMPLED;
    let state = tracestate.filter(|state| state.len() <= MOST).and_then(|state| state.parse().ok());
    let context = SpanContext::new(trace, span, flags, true, state.unwrap_or(TraceState::NONE));
    context.is_valid().then_some(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";

    #[test]
    fn a_callers_span_is_read() {
        for (flags, is_sampled) in [("00", false), ("01", true), ("03", true), ("fe", false)] {
            let context = read(&format!("00-{TRACE}-{SPAN}-{flags}"), Some("a=1,b@c=2")).unwrap();
            assert_eq!((context.trace_id().to_string(), context.span_id().to_string()), (TRACE.into(), SPAN.into()));
            assert_eq!((context.is_sampled(), context.is_remote()), (is_sampled, true));
            assert_eq!(context.trace_state().header(), "a=1,b@c=2");
        }
    }

    #[test]
    fn a_later_version_is_read_as_far_as_it_is_known() {
        for rest in ["", "-", "-what-comes"] {
            assert!(read(&format!("cc-{TRACE}-{SPAN}-01{rest}"), None).is_some(), "{rest:?}");
        }
        assert_eq!(read(&format!("cc-{TRACE}-{SPAN}-01.x"), None), None);
        assert_eq!(read(&format!("cc-{TRACE}-{SPAN}-01-{}", "x".repeat(MOST)), None), None);
    }

    #[test]
    fn what_is_not_valid_is_not_there() {
        let zeros = "0".repeat(32);
        let wrong = [
            String::new(),
            "00".to_owned(),
            "é".repeat(40),
            format!("{TRACE}-{SPAN}-01"),
            format!("ff-{TRACE}-{SPAN}-01"),
            format!("00-{TRACE}-{SPAN}-01-"),
            format!("00-{TRACE}-{SPAN}-01-x"),
            format!("00-{TRACE}-{SPAN}-1"),
            format!("00-{TRACE}-{SPAN}-+1"),
            format!("00-{}-{SPAN}-01", TRACE.to_uppercase()),
            format!("00-{}g-{SPAN}-01", &TRACE[1..]),
            format!("00-{zeros}-{SPAN}-01"),
            format!("00-{TRACE}-{}-01", &zeros[..16]),
            format!("00-{TRACE}0-{}-01", &SPAN[1..]),
            format!("00_{TRACE}_{SPAN}_01"),
            format!(" 00-{TRACE}-{SPAN}-01"),
        ];
        for traceparent in wrong {
            assert_eq!(read(&traceparent, None), None, "{traceparent:?}");
        }
    }

    #[test]
    fn a_state_that_is_too_long_or_no_state_is_left_out() {
        let long = format!("a={}", "x".repeat(MOST));
        for state in ["no state", "A=1", "a=1=2", long.as_str()] {
            let context = read(&format!("00-{TRACE}-{SPAN}-01"), Some(state)).unwrap();
            assert_eq!(context.trace_state(), &TraceState::NONE, "{state:?}");
        }
    }
}
