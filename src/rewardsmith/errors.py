"""Every exception Rewardsmith raises, in one tree.

    RewardsmithError
    ├── ConfigError (ValueError)        a config, argument or adapter id is wrong; names the field and the fix
    │   └── RewardSourceError           a reward function cannot travel as text; names the line and the fix
    ├── DatasetError (ValueError)       a dataset file or its rows are wrong; names rows and reasons
    ├── Unauthorized, Forbidden, NotFound, Conflict, TooLarge
    │                                   refusals of the server and the store; each is one HTTP status
    ├── APIError (RuntimeError)         what the SDK raises for an answer of the server
    │   ├── RequestError                4xx: the request was refused; .status says how
    │   ├── ServerError                 5xx: the server failed
    │   ├── ResponseError               an answer that is not the API's JSON
    │   └── ServerUnreachable           no answer at all
    ├── FinetuningError                 a job ended without an adapter
    └── JobError                        a job process cannot go on; its message becomes the job's error
        ├── ModelError                  the base model or tokenizer cannot be loaded or used
        ├── DeliveryError               the engine does not run the adapter that was delivered to it
        ├── RewardPoolError             reward functions cannot be loaded or keep failing
        │   └── PackageError            packages that they need cannot be installed
        ├── SandboxError                reward functions cannot be isolated as well as they must be
        ├── ServerLost                  the server stayed away longer than the job waits
        ├── LeaseLost                   another attempt owns this job now; stop at once
        └── JobCanceled                 the user canceled the job; end it at once

A user of the SDK writes:

    try:
        adapter = rs.adapters.create(...)
    except FinetuningError as error:      # the job failed
        ...
    except RewardsmithError as error:     # anything else this package can say
        ...

`status` is the HTTP status a server answers with when the exception leaves a route.
"""


class RewardsmithError(Exception):
    """Base of the tree. `message` is the sentence meant for a person."""

    status = 500

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(RewardsmithError, ValueError):
    status = 400


class RewardSourceError(ConfigError):
    pass


class DatasetError(RewardsmithError, ValueError):
    status = 400


class Unauthorized(RewardsmithError):
    status = 401


class Forbidden(RewardsmithError):
    status = 403


class NotFound(RewardsmithError):
    status = 404


class Conflict(RewardsmithError):
    status = 409


class TooLarge(RewardsmithError):
    status = 413


class APIError(RewardsmithError, RuntimeError):
    """`code` is the HTTP status of the answer, 0 when there was none."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class RequestError(APIError):
    pass


class ServerError(APIError):
    pass


class ResponseError(APIError):
    pass


class ServerUnreachable(APIError):
    pass


class FinetuningError(RewardsmithError):
    pass


class JobError(RewardsmithError):
    pass


class ModelError(JobError):
    pass


class DeliveryError(JobError):
    pass


class RewardPoolError(JobError):
    pass


class PackageError(RewardPoolError):
    pass


class SandboxError(JobError):
    status = 409


class ServerLost(JobError):
    pass


class LeaseLost(JobError):
    pass


class JobCanceled(JobError):
    pass
