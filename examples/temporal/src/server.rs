//! The Temporal server, mocked: a canned history, and the tasks the server would cut from it.
//!
//! Only this side is made up. The worker that polls the tasks, replays the history, runs the code
//! and answers is the real one.

use anyhow::Result;
use std::{future::Future, time::Duration};
use temporalio_common::protos::{
    coresdk::{AsJsonPayloadExt, IntoPayloadsExt},
    temporal::api::{
        command::v1::command::Attributes,
        common::v1::{ActivityType, WorkflowExecution, WorkflowType},
        history::v1::ActivityTaskScheduledEventAttributes,
        workflowservice::v1::PollActivityTaskQueueResponse,
    },
};
use temporalio_sdk_core::{
    Worker,
    replay::{TestHistoryBuilder, default_wes_attribs},
    test_help::{
        MockPollCfg, QueueResponse, ResponseType, build_mock_pollers, mock_worker,
        mock_worker_client,
    },
};
use tokio::sync::watch;

pub const ORDER: &str = "order-42";
const RUN: &str = "0199a7c0-2d5e-7b1a-9c3f-4e8d1b6a5f20";

/// How often the worker that will be killed is given the workflow.
pub const TASKS_BEFORE_THE_KILL: usize = 3;

/// The number of answers by which [`worker`] says that the workflow completed.
pub const DONE: usize = usize::MAX;

/// Which worker is served: the one that will be killed, or the one that takes over.
#[derive(Clone, Copy, PartialEq)]
pub enum Shift {
    Killed,
    Replacement,
}

/// A real core worker whose polls are answered from here.
///
/// `answers` counts what the worker has answered so far, which is what the next task waits for;
/// it ends at [`DONE`] when the worker completes the workflow.
pub fn worker(shift: Shift, answers: watch::Sender<usize>) -> Result<Worker> {
    let after = |count: usize| {
        let mut answers = answers.subscribe();
        async move {
            // An error means that the worker is gone, and nobody waits for the task any more.
            let _ = answers.wait_for(|seen| *seen >= count).await;
        }
    };
    let (workflow_tasks, activity_tasks) = match shift {
        Shift::Killed => (
            vec![
                ResponseType::ToTaskNum(1),
                workflow_task(after(3), 2),
                workflow_task(after(4), 3),
            ],
            vec![
                activity_task("reserve", "1", 1, after(1)),
                activity_task("reserve", "1", 2, after(2)),
                activity_task("charge", "2", 1, after(5)),
            ],
        ),
        // The server has noticed that the charge timed out and offers it to the next worker.
        Shift::Replacement => (
            vec![workflow_task(after(1), 4)],
            vec![activity_task("charge", "2", 2, after(0))],
        ),
    };

    let mut client = mock_worker_client();
    let answered = answers.clone();
    client
        .expect_complete_activity_task()
        .returning(move |_, _| {
            answered.send_modify(|count| *count += 1);
            Ok(Default::default())
        });
    let answered = answers.clone();
    client
        .expect_fail_activity_task()
        .returning(move |_, _, _, _| {
            answered.send_modify(|count| *count += 1);
            Ok(Default::default())
        });
    let mut mock = MockPollCfg::from_resp_batches(ORDER, history()?, workflow_tasks, client);
    mock.using_rust_sdk = true;
    mock.activity_responses = Some(activity_tasks);
    mock.completion_mock_fn = Some(Box::new(move |completion| {
        let completed = completion.commands.iter().any(|command| {
            matches!(
                command.attributes,
                Some(Attributes::CompleteWorkflowExecutionCommandAttributes(_))
            )
        });
        answers.send_modify(|count| *count = if completed { DONE } else { *count + 1 });
        Ok(Default::default())
    }));
    let mut mocks = build_mock_pollers(mock);
    // Nothing is cached: every suspension evicts the workflow, every resumption replays it.
    mocks.worker_cfg(|config| config.max_cached_workflows = 0);
    mocks.make_wft_stream_interminable();
    Ok(mock_worker(mocks))
}

/// What the server's history holds in the end. A task carries it up to the moment it is for.
fn history() -> Result<TestHistoryBuilder> {
    let mut history = TestHistoryBuilder::default();
    let mut started = default_wes_attribs();
    started.original_execution_run_id = RUN.to_owned();
    started.workflow_type = Some(WorkflowType {
        name: "Order".to_owned(),
    });
    history.add(started);

    history.add_full_wf_task();
    activity(&mut history, "reserve", "1", "reserved")?;
    history.add_full_wf_task();
    let timer = history.add_timer_started("1".to_owned());
    history.add_timer_fired(timer, "1".to_owned());
    history.add_full_wf_task();
    activity(&mut history, "charge", "2", "charged")?;
    history.add_full_wf_task();
    history.add_workflow_execution_completed();
    Ok(history)
}

fn activity(history: &mut TestHistoryBuilder, name: &str, id: &str, result: &str) -> Result<()> {
    let scheduled = history.add(ActivityTaskScheduledEventAttributes {
        activity_id: id.to_owned(),
        activity_type: Some(ActivityType {
            name: name.to_owned(),
        }),
        ..Default::default()
    });
    let started = history.add_activity_task_started(scheduled);
    history.add_activity_task_completed(scheduled, started, result.as_json_payload()?);
    Ok(())
}

fn workflow_task(when: impl Future<Output = ()> + Send + 'static, number: usize) -> ResponseType {
    ResponseType::UntilResolved(Box::pin(when), number)
}

fn activity_task(
    name: &str,
    id: &str,
    attempt: i32,
    when: impl Future<Output = ()> + Send + 'static,
) -> QueueResponse<PollActivityTaskQueueResponse> {
    QueueResponse {
        resp: PollActivityTaskQueueResponse {
            task_token: format!("{name} {attempt}").into_bytes(),
            workflow_execution: Some(WorkflowExecution {
                workflow_id: ORDER.to_owned(),
                run_id: RUN.to_owned(),
            }),
            activity_id: id.to_owned(),
            activity_type: Some(ActivityType {
                name: name.to_owned(),
            }),
            input: [().as_json_payload().expect("unit is JSON")].into_payloads(),
            start_to_close_timeout: Duration::from_secs(10).try_into().ok(),
            attempt,
            ..Default::default()
        },
        delay_until: Some(Box::pin(when)),
    }
}
