//! The rows of the decision as data: how a span relates to the stored context, and what is done for each relation.

/// How a tagged span relates to the context that is stored for its instance.
///
/// A span falls into the first row that fits, read from the top; its [`Continuation`] says what is done.
///
/// | relation | when | by default |
/// |---|---|---|
/// | `Observed` | the span has `workflow.observing = true` | [`Link`](Continuation::Link), if a context is stored in another trace |
/// | `Child` | nothing is stored for it, but for its `workflow.parent_instance_id`, in another trace than the natural parent's | [`ParentAndLink`](Continuation::ParentAndLink) |
/// | `Polled` | nothing is stored, and the natural parent is in the trace of a live [poller](crate::WorkflowContextStorageBuilder::poller_spans) | [`NewRoot`](Continuation::NewRoot) |
/// | `First` | nothing is stored, and there is another natural parent | [`Keep`](Continuation::Keep) |
/// | `Late` | the id was recorded when the span had already started | [`Link`](Continuation::Link) |
/// | `SameTrace` | the natural parent is in the stored trace | [`Keep`](Continuation::Keep) |
/// | `NewRun` | the stored context belongs to another `workflow.run_id` | [`NewRootAndLink`](Continuation::NewRootAndLink) |
/// | `Expired` | the stored trace is past `max_age` or `max_spans` | [`NewRootAndLink`](Continuation::NewRootAndLink) |
/// | `Resumed` | the stored context came from another process, or was made by [`create_resumed`](crate::WorkflowContextStorage::create_resumed) | [`ParentAndLink`](Continuation::ParentAndLink) |
/// | `Foreign` | the natural parent is in another trace: a poller, an HTTP request | [`ParentAndLink`](Continuation::ParentAndLink) |
/// | `Orphan` | there is no natural parent | [`Parent`](Continuation::Parent) |
///
/// A first span without a natural parent is a root, whatever the settings. A poller's trace counts as no natural parent
/// for all relations but `Polled` and `SameTrace`. For `First` and `Polled` nothing is stored, so only `Keep`, `NewRoot`
/// and `NewRootAndLink` are possible, and the link is to the natural parent. For `Observed` and `Late`, only `Keep` and `Link`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Relation {
    /// The first span of an instance, with a natural parent such as an HTTP request.
    First,
    /// The first span of an instance, in the trace of a poller.
    Polled,
    /// A context is stored, and the span has no natural parent.
    Orphan,
    /// The natural parent is already in the stored trace: local nesting.
    SameTrace,
    /// The natural parent is in another trace.
    Foreign,
    /// The stored context came from another process, or from `create_resumed`.
    Resumed,
    /// The first span of a child workflow, whose parent instance is stored.
    Child,
    /// The first span of another run of a known instance.
    NewRun,
    /// The id was recorded after the span had started, when its parent could no longer change.
    Late,
    /// The stored trace has reached `max_age` or `max_spans`.
    Expired,
    /// The span only looks at the instance: `workflow.observing = true`.
    Observed,
}

/// The action taken for the spans of a [`Relation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Continuation {
    /// The natural parent, and nothing else.
    Keep,
    /// The stored context becomes the parent.
    Parent,
    /// The natural parent, and a link to the stored context.
    Link,
    /// The stored context becomes the parent, with a link to the natural parent if there is one.
    ParentAndLink,
    /// No parent: a new trace.
    NewRoot,
    /// No parent, and a link to the stored context. A new run or generation is linked to a foreign natural parent too; a
    /// first span, for which nothing is stored, to its natural parent alone.
    NewRootAndLink,
}

impl Continuation {
    /// Returns `true` if a link is among what is done.
    pub(crate) fn links(self) -> bool {
        matches!(
            self,
            Self::Link | Self::ParentAndLink | Self::NewRootAndLink
        )
    }

    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::Keep => "kept its natural parent",
            Self::Parent => "child of the stored context",
            Self::Link => "kept its natural parent, linked to the stored context",
            Self::ParentAndLink => "child of the stored context, linked to its natural parent",
            Self::NewRoot => "a new root",
            Self::NewRootAndLink => "a new root, linked to the stored context",
        }
    }
}

impl Relation {
    const COUNT: usize = 11;

    /// Returns the value of the attribute `workflow.relation`, which every link of this crate carries.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Polled => "polled",
            Self::Orphan => "orphan",
            Self::SameTrace => "same_trace",
            Self::Foreign => "foreign",
            Self::Resumed => "resumed",
            Self::Child => "child",
            Self::NewRun => "new_run",
            Self::Late => "late",
            Self::Expired => "expired",
            Self::Observed => "observed",
        }
    }
}

/// The continuation of each relation, and the relations that take a fresh sampling decision.
#[derive(Clone, Debug)]
pub(crate) struct Relations {
    continuations: [Continuation; Relation::COUNT],
    resampled: [bool; Relation::COUNT],
}

impl Default for Relations {
    fn default() -> Self {
        let mut continuations = [Continuation::ParentAndLink; Relation::COUNT];
        continuations[Relation::First as usize] = Continuation::Keep;
        continuations[Relation::Polled as usize] = Continuation::NewRoot;
        continuations[Relation::Orphan as usize] = Continuation::Parent;
        continuations[Relation::SameTrace as usize] = Continuation::Keep;
        continuations[Relation::NewRun as usize] = Continuation::NewRootAndLink;
        continuations[Relation::Late as usize] = Continuation::Link;
        continuations[Relation::Expired as usize] = Continuation::NewRootAndLink;
        continuations[Relation::Observed as usize] = Continuation::Link;
        Self {
            continuations,
            resampled: [false; Relation::COUNT],
        }
    }
}

impl Relations {
    /// Returns the continuation as configured.
    #[inline]
    pub(crate) fn get(&self, relation: Relation) -> Continuation {
        self.continuations[relation as usize]
    }

    pub(crate) fn set(&mut self, relation: Relation, continuation: Continuation) {
        self.continuations[relation as usize] = continuation;
    }

    pub(crate) fn resample(&mut self, relation: Relation) {
        self.resampled[relation as usize] = true;
    }

    /// Returns `true` if spans of this relation leave the stored trace so that the sampler decides anew.
    #[inline]
    pub(crate) fn resamples(&self, relation: Relation) -> bool {
        self.resampled[relation as usize]
    }

    /// Returns the continuation for a stored context that is sampled or not.
    ///
    /// A new root asks the sampler anew. If the trace was not sampled and no new decision is wanted, the span stays in
    /// it: nothing is exported, so nothing grows.
    #[inline]
    pub(crate) fn for_stored(&self, relation: Relation, is_sampled: bool) -> Continuation {
        let continuation = self.get(relation);
        let is_new_root = matches!(
            continuation,
            Continuation::NewRoot | Continuation::NewRootAndLink
        );
        match self.resamples(relation) {
            true if !is_new_root => Continuation::NewRootAndLink,
            false if is_new_root && !is_sampled => Continuation::Parent,
            _ => continuation,
        }
    }
}
