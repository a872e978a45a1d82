# Two stages: the first builds a wheel and installs it with its locked dependencies, the second only carries the result.
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/metering
# Dependencies first and by themselves: they change less often than the code. Their hashes are checked.
COPY requirements.lock ./
RUN /opt/metering/bin/pip install --no-cache-dir --require-hashes -r requirements.lock
COPY pyproject.toml README.md ./
COPY generated generated
COPY deploy deploy
COPY service service
RUN /opt/metering/bin/pip install --no-cache-dir --no-deps .

FROM python:3.11-slim-bookworm
# A user with an entry in /etc/passwd: initdb of the embedded Postgres insists on one.
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/metering metering
COPY --from=build /opt/metering /opt/metering
ENV PATH=/opt/metering/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 METERING_DATA_DIR=/var/lib/metering/data
USER metering
VOLUME /var/lib/metering
EXPOSE 50051
# Without an API key only loopback is allowed. To serve other hosts, make a key and set METERING_LISTEN=0.0.0.0:50051.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["metering", "health"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["metering"]
CMD ["serve"]
